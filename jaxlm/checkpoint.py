"""Checkpoints with Orbax: written in the background, visible only when whole; the newest and the best are kept.

A checkpoint is up to four items: `params`, `ema` (where there is one), `train` (step, optimizer state and guard), and
`sync` (what a lossy reduction of gradients keeps, a row for each device). It does not depend on the number of devices,
but for those rows. The place in the data needs no saving: batch N is a function of the configuration and N. Each item
has the hashes of its files, which are compared before anything is restored (checksums.py).
"""

import concurrent.futures
import json
import logging as std_logging
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from jax.sharding import SingleDeviceSharding
from orbax.checkpoint.checkpoint_managers import PreservationPolicy

from jaxlm import checksums
from jaxlm.config import CheckpointConfig, UserError
from jaxlm.placement import Placement
from jaxlm.step import TrainState

# Orbax warns of a read-only folder, and of every item that it was not asked for; its errors are raised too.
logging.set_verbosity(logging.FATAL)


FIRST_PAUSE, LONGEST_PAUSE = 1.0, 60.0  # seconds between tries to save, each twice the one before
PATIENCE = 60.0  # seconds for which the last state of a run is tried to be saved


class CheckpointError(RuntimeError):
    """A checkpoint is there but cannot be used: exit code 4."""


class Unsaved(OSError):
    """A state could not be written, as often as it was tried: exit code 2."""


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


def _validation_losses(metrics: Path) -> dict[int, float]:
    """{step: loss} of the evaluations so far."""
    found = {}
    for line in metrics.read_text().splitlines() if metrics.exists() else []:
        with suppress(ValueError, KeyError, TypeError):  # half a line, or one of training
            m = json.loads(line)
            found[int(m["step"])] = float(m["eval_loss"])
    return found


class Checkpointer:
    """The `checkpoints` folder of a workdir.

    A save that fails is said, and tried again later with the state that there is then (`due`): training goes on. With
    several processes it raises, for the others wait for the one that failed.
    """

    def __init__(
        self, workdir: Path, config: CheckpointConfig, read_only: bool = False, say: Callable[[str], None] = print
    ):
        if not read_only:
            _hide_cut_off()
        self._workdir, self._config, self._read_only, self._say = workdir, config, read_only, say
        self.folder = (workdir / "checkpoints").resolve()
        self._worker = concurrent.futures.ThreadPoolExecutor(1, "checkpoint")
        self._saving: concurrent.futures.Future[None] | None = None  # a save under way
        self._last: int | None = None  # the step that it is of
        self._pause = FIRST_PAUSE
        self._retry_at: float | None = None  # where a save has failed
        self._writing: list[str] = []  # items of the checkpoint that is being written
        self._losses = _validation_losses(workdir / "metrics.jsonl")
        self._manager: Any = self._open()
        self.saved = self.latest()  # the newest step that is written

    def _open(self) -> Any:
        policy = None if self._read_only else _Kept(self._config, self._losses)
        return ocp.CheckpointManager(
            self.folder, item_handlers={item: _handler(self._writing) for item in ("params", "ema", "train", "sync")},
            options=ocp.CheckpointManagerOptions(
                preservation_policy=policy, read_only=self._read_only, cleanup_tmp_directories=not self._read_only
            ),
        )  # fmt: skip

    def latest(self) -> int | None:
        """The newest of `steps`."""
        return max(self.steps(), default=None)

    def steps(self) -> list[int]:
        """Those that are written: Orbax gives a checkpoint its name when it is whole."""
        return sorted(int(p.name) for p in self.folder.iterdir() if p.name.isdigit())

    def damage(self, step: int) -> str | None:
        """What is wrong with the files of a step; None if it is whole.

        Raises:
          UserError: they cannot be read now.
        """
        try:
            return checksums.damage(self.folder / str(step))
        except OSError as error:
            raise UserError(f"{self.folder / str(step)}: cannot be read now ({_reason(error)})") from error

    def newest_whole(self) -> tuple[int | None, dict[int, str]]:
        """The newest step whose files are whole, and what is wrong with newer ones."""
        damage: dict[int, str] = {}
        for step in reversed(self.steps()):
            reason = self.damage(step)
            if reason is None:
                return step, damage
            damage[step] = reason
        return None, damage

    def save(
        self, step: int, state: TrainState, eval_loss: float | None = None, before: Callable[[], None] = lambda: None
    ) -> None:
        """Starts to write the state; it may be donated as soon as this returns. A step that is there is left alone.

        Args:
          state: as `Placement.saved` gives it.
          before: what must have been done before there is a checkpoint.
        """
        self._settle()
        if step == self.saved or (self._retry_at is not None and not self.due()):
            return
        on_cpu = jax.default_backend() == "cpu"
        if on_cpu:
            # There Orbax reads the arrays themselves while the loop goes on, and the next step writes over donated
            # ones; from GPUs it takes a copy to the host anyway.
            state = jax.tree.map(jnp.copy, state)
        train = {"step": state.step, "opt_state": state.opt_state, "guard": state.guard}
        items = {"params": state.params, "train": train}
        items |= {name: tree for name, tree in (("ema", state.ema), ("sync", state.sync)) if jax.tree.leaves(tree)}
        self._writing[:] = items
        if eval_loss is not None:
            self._losses[step] = eval_loss
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
            checksums.sync(self.folder)

        self._last = step
        if on_cpu and jax.process_count() == 1:
            self._saving = self._worker.submit(lambda: end(begin()))
        else:  # begun here: it reads the devices, and meets the other processes
            self._saving = self._worker.submit(end, begin())

    def settled(self) -> int | None:
        """The newest step that is written, when a save under way has ended."""
        self._settle()
        return self.saved

    def due(self) -> bool:
        """Whether a save has failed, and it is time to try again."""
        if self._saving is not None and self._saving.done():
            self._settle()
        return self._retry_at is not None and time.monotonic() >= self._retry_at

    def finish(self, step: int, state: TrainState, *args: Any) -> None:
        """Saves and waits; where that fails, tries again for a while.

        Raises:
          Unsaved: it cannot be written.
        """
        deadline, self._pause = time.monotonic() + PATIENCE, FIRST_PAUSE
        while True:
            self._settle()
            self._retry_at = None
            self.save(step, state, *args)
            error = self._settle()
            if error is None:
                return
            if time.monotonic() >= deadline:
                raise Unsaved(
                    f"{self.folder}: the state of step {step} cannot be saved: {_reason(error)}; the newest checkpoint"
                    f" is of step {self.saved}; mend that, and run the same command again"
                ) from error
            time.sleep(max(0.0, min(self._retry_at or 0, deadline) - time.monotonic()))

    def _settle(self) -> Exception | None:
        """Waits for a save under way, and gives its error; a failed one is said, and what it left is removed."""
        if self._saving is None:
            return None
        saving, self._saving = self._saving, None
        error = saving.exception()
        if error is None:
            self.saved, self._pause, self._retry_at = self._last, FIRST_PAUSE, None
            return None
        if jax.process_count() > 1 or not isinstance(error, Exception):
            raise error
        self._retry_at = time.monotonic() + self._pause
        self._say(f"the state of step {self._last} is NOT saved: {_reason(error)}; the next try is in {self._pause:.0f}"
                  f" s, the newest checkpoint is of step {self.saved}")  # fmt: skip
        self._pause = min(2 * self._pause, LONGEST_PAUSE)
        if self._manager is not None:
            with suppress(Exception):  # the error that is known already
                self._manager.close()
        self._manager = None  # the next one removes what this save left
        return error

    def restore(self, step: int, placement: Placement, fresh: TrainState) -> TrainState:
        """The state of a step, on the devices.

        Args:
          fresh: that of step 0 there, whose shapes and types are wanted.

        Raises:
          CheckpointError: it is damaged, or of another model or optimizer.
        """
        like, there = placement.saved_like(fresh), self._items(step)
        train = {"step": like.step, "opt_state": like.opt_state}
        if any(key.startswith("guard") for key in self._shapes(step, "train")):
            train["guard"] = like.guard
        wanted = {"params": like.params, "train": train}
        if like.ema is not None and "ema" in there:
            wanted["ema"] = like.ema
        same = "sync" in there and self._shapes(step, "sync") == shapes(like.sync)
        if same:
            wanted["sync"] = like.sync
        with self._damage(step):
            args = {name: ocp.args.StandardRestore(tree) for name, tree in wanted.items()}
            found = self._manager.restore(step, args=ocp.args.Composite(**args))
        ema = found["ema"] if "ema" in wanted else None
        if like.ema is not None and ema is None:  # the average starts now
            ema = jax.tree.map(jnp.copy, found["params"])
        sync = found["sync"] if same else placement.everywhere(fresh).sync
        if not same and "sync" in there and jax.tree.leaves(sync):
            sync = _adapted(self._on_host(step, "sync"), sync)
        train = found["train"]
        guard = train.get("guard", placement.everywhere(fresh).guard)  # an older jaxlm had none
        return placement.restored(TrainState(train["step"], found["params"], train["opt_state"], ema, sync, guard))

    def restore_params(self, step: int, ema: bool = True) -> Any:
        """The parameters of a step as NumPy arrays; their moving average where there is one and `ema` is set."""
        return self._on_host(step, "ema" if ema and "ema" in self._items(step) else "params")

    def restore_arrays(self, step: int) -> dict[str, np.ndarray]:
        """All that a step holds, by name: {'train/step': …}"""
        items = [item for item in ("params", "ema", "train", "sync") if item in self._items(step)]
        return {
            f"{item}/{name}": np.asarray(x) for item in items for name, x in _named(self._on_host(step, item)).items()
        }

    def _on_host(self, step: int, item: str) -> Any:
        """As NumPy arrays, read by way of a device of this process, since those that saved it need not be here."""
        here = SingleDeviceSharding(_host())
        with self._damage(step):
            meta = self._manager.item_metadata(step)[item]
            if meta is None:
                raise ValueError(f"it has no {item}")
            like = jax.tree.map(lambda m: jax.ShapeDtypeStruct(m.shape, m.dtype, sharding=here), meta.tree)
            found = self._manager.restore(step, args=ocp.args.Composite(**{item: ocp.args.StandardRestore(like)}))
        return jax.device_get(found[item])

    def _shapes(self, step: int, item: str) -> dict[str, tuple[int, ...]]:
        with self._damage(step):
            return shapes(self._manager.item_metadata(step)[item].tree)

    def _items(self, step: int) -> list[str]:
        return [p.name for p in (self.folder / str(step)).iterdir()]

    @contextmanager
    def _damage(self, step: int) -> Iterator[None]:
        """Makes an error in reading a step a CheckpointError, without the tracebacks of reads that it cuts off."""
        before = _hide_cut_off()
        try:
            yield
        except Exception as error:  # of many kinds: every one means that this checkpoint is of no use here
            reason = " ".join(str(error).split())[:300]
            raise CheckpointError(f"{self.folder / str(step)}: cannot be restored: {reason}") from error
        sys.unraisablehook = before  # not after an error: those reads end later

    def wait(self) -> None:
        """Returns when what was saved is on disk; raises if it could not be written."""
        if error := self._settle():
            raise error

    def close(self) -> None:
        if self._saving is not None and jax.process_count() == 1:
            self._settle()  # a failure is said, and hides no other error
        self._worker.shutdown()
        if self._manager is not None:
            self._manager.close()


def _reason(error: BaseException) -> str:
    return " ".join((getattr(error, "strerror", None) or str(error) or type(error).__name__).split())[:300]


def _hide_cut_off() -> Any:
    """Keeps what an error cuts off in Orbax's background from writing tracebacks of its own; gives the hook before."""
    std_logging.getLogger("asyncio").setLevel(std_logging.CRITICAL)
    before = sys.unraisablehook
    sys.unraisablehook = lambda e: None if str(e.exc_value) == "Event loop is closed" else before(e)
    return before


def shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    """{'embed/embedding': (V, D), ...}"""
    return {name: tuple(x.shape) for name, x in _named(tree).items()}


def _named(tree: Any) -> dict[str, Any]:
    return {_name(path): x for path, x in jax.tree_util.tree_flatten_with_path(tree)[0]}


def _name(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _host() -> Any:
    """The CPU as a device; where JAX is told to have none (JAX_PLATFORMS=cuda), the first device."""
    try:
        return jax.local_devices(backend="cpu")[0]
    except RuntimeError:
        return jax.local_devices()[0]


def _adapted(saved: Any, fresh: Any) -> Any:
    """What a reduction kept, for other devices or another reduction: each gets the mean of all rows, so that the mean
    over the devices, which is what the next step adds to the gradient, stays the same. What is new starts afresh.
    """
    old = _named(saved)

    def one(path: Any, new: jax.Array) -> jax.Array:
        x = old.get(_name(path))
        if x is None or x.shape[1:] != new.shape[1:]:
            return new
        rows = x if x.shape == new.shape else np.mean(x, axis=0, dtype=np.float64).astype(x.dtype)
        return jax.make_array_from_callback(
            new.shape, new.sharding, lambda index: np.broadcast_to(rows, new.shape)[index]
        )

    return jax.tree_util.tree_map_with_path(one, fresh)
