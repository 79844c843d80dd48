"""Writing checkpoints with Orbax: in the background, visible only when whole; the newest and the best are kept.

A save that fails is said, and tried again later with the state that there is then: training goes on. With several
processes it raises, for the others wait for the one that failed.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import PreservationPolicy

from jaxlm import checksums
from jaxlm.checkpoint import ITEMS, folder_of, hide_cut_off, reason_of, steps_in
from jaxlm.config import CheckpointConfig
from jaxlm.metrics import validation_losses
from jaxlm.retry import Pause, insist
from jaxlm.step import TrainState


class Unsaved(OSError):
    """What a run ended with could not be written, as often as it was tried: exit code 2."""


class Saver:
    """Writes the `checkpoints` folder of a workdir."""

    def __init__(self, workdir: Path, config: CheckpointConfig, say: Callable[[str], None] = print):
        hide_cut_off()
        self._config, self._say, self._folder = config, say, folder_of(workdir)
        self._worker = ThreadPoolExecutor(1, "checkpoint")
        self._under_way: tuple[int, Future[None]] | None = None
        self._pause = Pause()
        self._items: list[str] = []  # of the checkpoint that is being written
        self._losses = validation_losses(workdir)
        self._manager: Any = self._open()
        self.saved = max(steps_in(self._folder), default=None)  # the newest step that is written

    def _open(self) -> ocp.CheckpointManager:
        return ocp.CheckpointManager(
            self._folder, item_handlers={item: _handler(self._items) for item in ITEMS},
            options=ocp.CheckpointManagerOptions(
                preservation_policy=_Kept(self._config, self._losses), cleanup_tmp_directories=True
            ),
        )  # fmt: skip

    def scored(self, step: int, loss: float) -> None:
        """Tells the validation loss of a step, by which the best checkpoints are kept."""
        self._losses[step] = loss

    def save(self, step: int, state: TrainState, before: Callable[[], None] = lambda: None) -> None:
        """Starts to write the state; it may be donated as soon as this returns. A step that is there is left alone, and
        none is begun in the pause after one that failed.

        Args:
          state: as `Placement.saved` gives it.
          before: what must have been done before there is a checkpoint.
        """
        self._settle()
        if step == self.saved or not self._pause.over:
            return
        on_cpu = jax.default_backend() == "cpu"
        if on_cpu:
            # There Orbax reads the arrays themselves while the loop goes on, and the next step writes over donated
            # ones; from GPUs it takes a copy to the host anyway.
            state = jax.tree.map(jnp.copy, state)
        train = {"step": state.step, "opt_state": state.opt_state, "guard": state.guard,
                 "loss_mean": state.loss_mean}  # fmt: skip
        items = {"params": state.params, "train": train}
        items |= {name: tree for name, tree in (("ema", state.ema), ("sync", state.sync)) if jax.tree.leaves(tree)}
        self._items[:] = items
        args = ocp.args.Composite(**{name: ocp.args.StandardSave(tree) for name, tree in items.items()})

        def begin() -> Exception | None:
            try:
                before()
                self._manager = self._manager or self._open()
                self._manager.save(step, args=args)
            except Exception as error:
                return error

        def end(failed: Exception | None) -> None:
            if failed:
                raise failed
            self._manager.wait_until_finished()
            checksums.sync(self._folder)

        if on_cpu and jax.process_count() == 1:
            self._under_way = step, self._worker.submit(lambda: end(begin()))
        else:  # begun here: it reads the devices, and meets the other processes
            self._under_way = step, self._worker.submit(end, begin())

    def due(self) -> bool:
        """Whether a save has failed, and it is time to try again."""
        if self._under_way is not None and self._under_way[1].done():
            self._settle()
        return self._pause.failing and self._pause.over

    def wait(self) -> int | None:
        """The newest step that is written, when a save under way has ended."""
        self._settle()
        return self.saved

    def finish(self, step: int, state: TrainState, *args: Any) -> None:
        """Saves and waits; where that fails, tries again for a while.

        Raises:
          Unsaved: it cannot be written.
        """

        def act() -> None:
            self._settle()
            self._pause.end()
            self.save(step, state, *args)
            if error := self._settle():
                raise error

        try:
            insist(act)
        except Exception as error:
            raise Unsaved(
                f"{self._folder}: the state of step {step} cannot be saved: {reason_of(error)}; the newest checkpoint"
                f" is of step {self.saved}; mend that, and run the same command again"
            ) from error

    def _settle(self) -> Exception | None:
        """Waits for a save under way, and gives its error; a failed one is said, and what it left is removed."""
        if self._under_way is None:
            return None
        (step, saving), self._under_way = self._under_way, None
        error = saving.exception()
        if error is None:
            self.saved = step
            self._pause.end()
            return None
        if jax.process_count() > 1 or not isinstance(error, Exception):
            raise error
        self._say(f"the state of step {step} is NOT saved: {reason_of(error)}; the next try is in"
                  f" {self._pause.begin():.0f} s, the newest checkpoint is of step {self.saved}")  # fmt: skip
        if self._manager is not None:
            with suppress(Exception):  # the error that is known already
                self._manager.close()
        self._manager = None  # the next one removes what this save left
        return error

    def close(self) -> None:
        if jax.process_count() == 1:
            self._settle()  # a failure is said, and hides no other error
        self._worker.shutdown()
        if self._manager is not None:
            self._manager.close()


def _handler(items: list[str]) -> ocp.StandardCheckpointHandler:
    """Orbax's, which adds the hashes of an item's files before the checkpoint, of these items, becomes visible."""
    handler = ocp.StandardCheckpointHandler()
    finish = handler.finalize

    def finalize(directory: Any) -> None:
        finish(directory)
        checksums.write(Path(directory), items)

    handler.finalize = finalize
    return handler


class _Kept(PreservationPolicy):
    """The newest, and the best of those whose validation loss is known."""

    def __init__(self, config: CheckpointConfig, losses: dict[int, float]):
        self._config, self._losses = config, losses

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        steps = [c.step for c in checkpoints]
        best = sorted((s for s in steps if s in self._losses), key=lambda s: self._losses[s])[: self._config.keep_best]
        return [s in best or s in steps[-self._config.keep :] for s in steps]
