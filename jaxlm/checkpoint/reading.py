"""Reads checkpoints: lists them, checks that they are whole, and restores a state. writing.py writes them.

A checkpoint has up to four items: `params`; `ema`, if the run keeps a moving average; `train` (step, optimizer state,
guard and mean loss); and `sync`, the residuals of a lossy reduction of gradients, one row per device. Only these rows
depend on the number of devices. The place in the data is not saved, because batch N is a function of the configuration
and N. Each item lists the hashes of its files, which are compared before anything is restored (checksums.py).
"""

import logging as std_logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from jax.sharding import SingleDeviceSharding

from jaxlm.checkpoint import checksums
from jaxlm.config import UserError
from jaxlm.config.paths import steps_in
from jaxlm.config.pretrained import Step
from jaxlm.train import guard, trained
from jaxlm.train.placement import Placement
from jaxlm.train.step import TrainState, float32

# Orbax warns about a read-only folder, and about every item that it was not asked for; it raises its errors besides
# logging them. If one of its reads or writes fails, it drops the coroutines of the others, and Python warns that they
# were never awaited.
logging.set_verbosity(logging.FATAL)
warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)

ITEMS = ("params", "ema", "train", "sync")


class CheckpointError(RuntimeError):
    """A checkpoint is there but cannot be used: exit code 4."""


def folder_of(workdir: Path) -> Path:
    return (workdir / "checkpoints").resolve()


class Checkpoints:
    """Opens a workdir's checkpoints for reading."""

    def __init__(self, workdir: Path):
        self.folder = folder_of(workdir)
        self._manager = ocp.CheckpointManager(
            self.folder,
            item_handlers={item: ocp.StandardCheckpointHandler() for item in ITEMS},
            options=ocp.CheckpointManagerOptions(read_only=True),
        )

    def steps(self) -> list[int]:
        return steps_in(self.folder)

    def damage(self, step: int) -> str | None:
        """Returns what is wrong with the files of a step; None if the checkpoint is whole.

        Raises:
          UserError: the files cannot be read at present.
        """
        try:
            return checksums.damage(self.folder / str(step))
        except OSError as error:
            raise UserError(f"{self.folder / str(step)}: cannot be read now ({reason_of(error)})") from error

    def check_step(self, asked: str, step: Step, losses: dict[int, float]) -> None:
        """Raises UserError if there is no such checkpoint.

        Args:
          asked: the option and its value, for the message.
          losses: {step: validation loss}.
        """
        there = self.steps()
        if isinstance(step, int) and step not in there:
            raise UserError(
                f"{asked}: no checkpoint of step {step} in {self.folder}; allowed: best, or one of"
                f" {', '.join(map(str, there))}"
            )
        if step == "best" and not set(there) & losses.keys():
            raise UserError(
                f"{asked}: no checkpoint in {self.folder} has a validation loss; allowed: one of"
                f" {', '.join(map(str, there))}"
            )

    def find_whole(self, step: Step, losses: dict[int, float]) -> tuple[int | None, dict[int, str]]:
        """Returns the newest (`step` None) or best whole step, or the step given, and the damage of those tried before.

        The step is None if no candidate is whole.
        """
        damage: dict[int, str] = {}
        there = self.steps()[::-1]
        if step is not None:
            there = sorted(losses.keys() & set(there), key=lambda s: losses[s]) if step == "best" else [step]
        for step in there:
            reason = self.damage(step)
            if reason is None:
                return step, damage
            damage[step] = reason
        return None, damage

    def restore(self, step: int, placement: Placement, fresh: TrainState) -> TrainState:
        """Restores the state of a step onto the devices.

        Args:
          fresh: the initial state there; the restored one gets its shapes and dtypes.

        Raises:
          CheckpointError: the checkpoint is damaged, or belongs to another model or optimizer.
        """
        like, there = placement.saved_like(fresh), self._items(step)
        train = {"step": like.step, "opt_state": like.opt_state}
        saved = self._shapes(step, "train")
        newer = [name for name in ("guard", "loss_mean") if any(key.startswith(f"{name}/") for key in saved)]
        train |= {name: getattr(like, name) for name in newer}  # older versions saved neither
        if "guard/norms" in saved:
            train["guard"] = guard.old(like.guard)
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
            ema = jax.tree.map(jnp.copy, float32(trained.within(found["params"], like.ema)))
        sync = found["sync"] if same else placement.everywhere(fresh).sync
        if not same and "sync" in there and jax.tree.leaves(sync):
            sync = _adapted(self._on_host(step, "sync"), sync)
        train = found["train"]
        state = placement.everywhere(fresh)
        train["guard"] = guard.upgraded(train.get("guard"), state.guard)
        return placement.restored(state._replace(**train, params=found["params"], ema=ema, sync=sync))

    def restore_params(self, step: int, ema: bool = True) -> Any:
        """Returns the parameters of a step as NumPy arrays; with `ema`, their moving average if there is one."""
        if not ema or "ema" not in self._items(step):
            return self._on_host(step, "params")
        average = self._on_host(step, "ema")
        if self._shapes(step, "params").keys() == shapes(average).keys():
            return average
        return trained.joined(self._on_host(step, "params"), average)  # frozen parameters have no average

    def restore_arrays(self, step: int) -> dict[str, np.ndarray]:
        """Returns all arrays of a step by name: {'train/step': …}"""
        items = [item for item in ITEMS if item in self._items(step)]
        return {
            f"{item}/{name}": np.asarray(x) for item in items for name, x in _named(self._on_host(step, item)).items()
        }

    def _on_host(self, step: int, item: str) -> Any:
        """Returns an item as NumPy arrays, read through a local device: those that saved it may not be here."""
        here = SingleDeviceSharding(host())
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
        """Turns an error in reading a step into a CheckpointError; hides the tracebacks of the reads it cuts off."""
        before = hide_cut_off()
        try:
            yield
        except Exception as error:  # whatever it is, this checkpoint cannot be used here
            reason = " ".join(str(error).split())[:300]
            raise CheckpointError(f"{self.folder / str(step)}: cannot be restored: {reason}") from error
        sys.unraisablehook = before  # kept after an error, because the other reads end later

    def close(self) -> None:
        self._manager.close()


def reason_of(error: BaseException) -> str:
    """Returns the reason of an error in one line."""
    return " ".join((getattr(error, "strerror", None) or str(error) or type(error).__name__).split())[:300]


def hide_cut_off() -> Any:
    """Hides the tracebacks of background work in Orbax that an error cuts off. Returns the previous hook."""
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


def host() -> Any:
    """Returns the CPU as a device; the first device if JAX has no CPU (JAX_PLATFORMS=cuda)."""
    try:
        return jax.local_devices(backend="cpu")[0]
    except RuntimeError:
        return jax.local_devices()[0]


def _adapted(saved: Any, fresh: Any) -> Any:
    """Adapts a reduction's saved state to other devices or another reduction.

    Each device gets the mean of all rows. That keeps the mean over the devices, which is what the next step adds to the
    gradient. Arrays that were not saved keep their fresh values.
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
