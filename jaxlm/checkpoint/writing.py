"""Writes checkpoints with Orbax: in the background, visible only when whole; keeps the newest and the best.

Training continues after a failed save; the failure is reported, and a later save tries again with the state of that
time. Only the first process writes, and it tells the others how the save went. All processes begin a save at the same
step, because they gather the state for it together.
"""

import json
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import PreservationPolicy

from jaxlm.checkpoint import checksums
from jaxlm.checkpoint.metrics_file import validation_losses
from jaxlm.checkpoint.reading import ITEMS, folder_of, hide_cut_off, reason_of
from jaxlm.config import CheckpointConfig
from jaxlm.config.paths import steps_in
from jaxlm.host import distributed
from jaxlm.host.durable import sync
from jaxlm.host.retry import Pause, insist
from jaxlm.train.step import TrainState

ASKED_EVERY = 64  # the other processes ask how a save went at least every 64 steps


class Unsaved(OSError):
    """The last state or metrics of a run could not be written in spite of all retries: exit code 2."""


class Saver:
    """Writes the `checkpoints` folder of a workdir. All processes call its methods, except `close`, at the same
    steps.
    """

    def __init__(self, workdir: Path, config: CheckpointConfig, say: Callable[[str], None] = print):
        hide_cut_off()
        self._config, self._say, self._folder = config, say, folder_of(workdir)
        self._worker = ThreadPoolExecutor(1, "checkpoint")
        self._begun = 0  # the step of the last save
        # (step, future) of a save under way; without a future, the first process writes, not this one.
        self._under_way: tuple[int, Future[None] | None] | None = None
        self._pause = Pause()
        self._items: list[str] = []  # of the checkpoint being written
        self._losses = validation_losses(workdir)
        self._manager: Any = self._open() if jax.process_index() == 0 else None
        # the newest step written
        self.saved: int | None = _from_first("the newest checkpoint", lambda: max(steps_in(self._folder), default=None))

    def _open(self) -> ocp.CheckpointManager:
        self._folder.mkdir(parents=True, exist_ok=True)
        return ocp.CheckpointManager(
            self._folder,
            item_handlers={item: _handler(self._items) for item in ITEMS},
            options=ocp.CheckpointManagerOptions(
                preservation_policy=_Kept(self._config, self._losses),
                cleanup_tmp_directories=True,
                create=False,
                multiprocessing_options=ocp.options.MultiprocessingOptions(active_processes={0}),
            ),
        )

    def scored(self, step: int, loss: float) -> None:
        """Records the validation loss of a step, which decides which checkpoints are the best."""
        self._losses[step] = loss

    def save(self, step: int, state: TrainState | None, before: Callable[[], None] = lambda: None) -> None:
        """Waits for a save under way, then starts to write the state, which may be donated as soon as this returns.

        Does nothing if the step is saved already, or during the pause after a failed save.

        Args:
          state: as `Placement.saved` returns it.
          before: called before the checkpoint is written.
        """
        self._settle()
        if step == self.saved or (self._pause.failing and not self._may_try()):
            return
        self._begun = step
        self._under_way = step, None if state is None else self._write(step, state, before)

    def _write(self, step: int, state: TrainState, before: Callable[[], None]) -> Future[None]:
        on_gpu = jax.default_backend() != "cpu"
        if not on_gpu and jax.process_count() == 1:
            # On CPU, Orbax reads the arrays themselves while the loop continues, and the next step overwrites donated
            # ones. From GPUs it copies to the host anyway.
            state = jax.tree.map(jnp.copy, state)
        train = {"step": state.step, "opt_state": state.opt_state, "guard": state.guard, "loss_mean": state.loss_mean}
        items = {"params": state.params, "train": train}
        items |= {name: tree for name, tree in (("ema", state.ema), ("sync", state.sync)) if jax.tree.leaves(tree)}
        self._items[:] = items
        args = ocp.args.Composite(**{name: ocp.args.StandardSave(tree) for name, tree in items.items()})

        def begin() -> Exception | None:
            try:
                before()
                self._manager = self._manager or self._open()
                self._manager.save(step, args=args, custom_metadata=checksums.PROMISE)
            except Exception as error:
                return error

        def end(failed: Exception | None) -> None:
            if failed:
                raise failed
            self._manager.wait_until_finished()
            sync(self._folder)

        if on_gpu and jax.process_count() == 1:  # starts in this thread, because it reads the devices
            return self._worker.submit(end, begin())
        return self._worker.submit(lambda: end(begin()))

    def due(self, step: int) -> bool:
        """Whether a save has failed and it is time to try again.

        The other processes ask the first one after 1, 2, 4 … steps, then every ASKED_EVERY steps.
        """
        since = step - self._begun
        if self._under_way is None and not self._pause.failing:
            return False
        if jax.process_count() > 1 and since & (since - 1) and since % ASKED_EVERY:
            return False
        if self._under_way is not None:
            saving = self._under_way[1]
            if _from_first("whether a save has ended", lambda: saving is not None and saving.done()):
                self._settle()
        return self._pause.failing and self._may_try()

    def _may_try(self) -> bool:
        return _from_first("whether to save again", lambda: self._pause.over)

    def wait(self) -> int | None:
        """Waits for a save under way. Returns the newest step written."""
        self._settle()
        return self.saved

    def finish(self, step: int, state: TrainState | None, *args: Any) -> None:
        """Saves and waits; if that fails, tries again for a while.

        Raises:
          Unsaved: the state cannot be written.
        """

        def act() -> None:
            self._settle()
            self._pause.end()
            self.save(step, state, *args)
            if error := self._settle():
                raise error

        try:
            insist(act, lambda late: _from_first("whether to give up saving", lambda: late))
        except Exception as error:
            raise Unsaved(
                f"{self._folder}: the state of step {step} cannot be saved: {reason_of(error)}; {self._newest()};"
                " fix that, and run the same command again"
            ) from error

    def _settle(self) -> Exception | None:
        """Waits for a save under way. Returns its error, the same on all processes."""
        if self._under_way is None:
            return None
        (step, saving), self._under_way = self._under_way, None
        error = None if saving is None else saving.exception()
        if not isinstance(error, Exception | None):
            raise error
        reason = _from_first(f"the checkpoint of step {step}", lambda: error and reason_of(error))
        if reason and error is None:
            error = OSError(reason)  # the first process's error
        self._end(step, error)
        return error

    def _end(self, step: int, error: BaseException | None) -> None:
        """Records the end of a save. After a failure, reports it and closes Orbax; the next save opens it again,
        which removes what is left.
        """
        if error is None:
            self.saved = step
            self._pause.end()
            return
        self._say(
            f"the state of step {step} is NOT saved: {reason_of(error)}; the next try is in"
            f" {self._pause.begin():.0f} s, {self._newest()}"
        )
        if self._manager is not None:
            with suppress(Exception):  # the same error again
                self._manager.close()
        self._manager = None  # the next manager removes what this save left

    def _newest(self) -> str:
        return "there is no checkpoint yet" if self.saved is None else f"the newest checkpoint is of step {self.saved}"

    def close(self) -> None:
        """Ends the writing. The other processes take no part, because they may be anywhere in their loops."""
        if self._under_way is not None and (saving := self._under_way[1]) is not None:
            self._end(self._under_way[0], saving.exception())  # reports a failure without hiding another error
        self._under_way = None
        self._worker.shutdown()
        if self._manager is not None:
            self._manager.close()


def write_params(workdir: Path, params: Any) -> None:
    """Writes a checkpoint of step 0 that holds parameters alone, for runs that start from them."""
    hide_cut_off()
    with ocp.CheckpointManager(
        folder_of(workdir),
        item_handlers={"params": _handler(["params"], save_concurrent_gb=1)},  # it copies what it writes
        options=ocp.CheckpointManagerOptions(create=True),
    ) as manager:
        items = ocp.args.Composite(params=ocp.args.StandardSave(params))
        manager.save(0, args=items, custom_metadata=checksums.PROMISE)
    sync(folder_of(workdir))


def _from_first(what: str, value: Callable[[], Any]) -> Any:
    """Returns the value that the first process computes; it is the one that writes."""
    return json.loads(distributed.from_first(what, lambda: json.dumps(value())))


def _handler(items: list[str], **options: Any) -> ocp.StandardCheckpointHandler:
    """Returns an Orbax handler that also writes the hashes of an item's files before the checkpoint becomes visible.

    Args:
      items: the items of the checkpoint being written.
      options: for Orbax.
    """
    handler = ocp.StandardCheckpointHandler(**options)
    finish = handler.finalize

    def finalize(directory: Any) -> None:
        finish(directory)
        checksums.write(Path(directory), items)

    handler.finalize = finalize
    return handler


class _Kept(PreservationPolicy):
    """Keeps the newest checkpoints, and the best of those with a validation loss."""

    def __init__(self, config: CheckpointConfig, losses: dict[int, float]):
        self._config, self._losses = config, losses

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        steps = [c.step for c in checkpoints]
        best = sorted((s for s in steps if s in self._losses), key=lambda s: self._losses[s])[: self._config.keep_best]
        return [s in best or s in steps[-self._config.keep :] for s in steps]
