"""Checkpoints with Orbax: written in the background, visible only when whole; the newest and the best are kept.

A checkpoint is up to four items: `params`, `ema` (where there is one), `train` (step and optimizer state), and `sync`
(what a lossy reduction of gradients keeps, a row for each device). It does not depend on the number of devices, but for
those rows. The place in the data needs no saving: batch N is a function of the configuration and N.
"""

import logging as std_logging
import sys
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
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, BestN, LatestN

from jaxlm.config import CheckpointConfig
from jaxlm.placement import Placement
from jaxlm.step import TrainState

# Orbax warns of a read-only folder, and of every item that it was not asked for; its errors are raised too.
logging.set_verbosity(logging.FATAL)


class CheckpointError(RuntimeError):
    """A checkpoint is there but cannot be used: exit code 4."""


class Checkpointer:
    """The `checkpoints` folder of a workdir."""

    def __init__(self, workdir: Path, config: CheckpointConfig, read_only: bool = False):
        if not read_only:
            _hide_cut_off()
        newest = LatestN(config.keep)
        best = BestN(
            get_metric_fn=lambda m: m["eval_loss"],
            reverse=True,
            n=config.keep_best,
            keep_checkpoints_without_metrics=False,
        )
        self._manager = ocp.CheckpointManager(
            (workdir / "checkpoints").resolve(),
            item_handlers={item: ocp.StandardCheckpointHandler() for item in ("params", "ema", "train", "sync")},
            options=ocp.CheckpointManagerOptions(
                preservation_policy=None if read_only else AnyPreservationPolicy([newest, best]), read_only=read_only
            ),
        )

    def latest(self) -> int | None:
        return self._manager.latest_step()

    def steps(self) -> list[int]:
        return sorted(self._manager.all_steps())

    def check(self, step: int) -> None:
        """Raises CheckpointError if a step is a folder without a checkpoint."""
        if "params" not in self._items(step):
            folder = self._manager.directory / str(step)
            raise CheckpointError(
                f"{folder}: cannot be restored: no params in it; without this folder the one before it counts"
            )

    def save(self, step: int, state: TrainState, eval_loss: float | None = None) -> None:
        """Starts to write the state; it may be donated as soon as this returns. A step that is there is left alone.

        Args:
          state: as `Placement.saved` gives it.
        """
        if step == self.latest():
            return
        if jax.default_backend() == "cpu":
            # There Orbax reads the arrays themselves while the loop goes on, and the next step writes over donated
            # ones; from GPUs it takes a copy to the host anyway.
            state = jax.tree.map(jnp.copy, state)
        items = {"params": state.params, "train": {"step": state.step, "opt_state": state.opt_state}}
        items |= {name: tree for name, tree in (("ema", state.ema), ("sync", state.sync)) if jax.tree.leaves(tree)}
        metrics = None if eval_loss is None else {"eval_loss": eval_loss}
        args = ocp.args.Composite(**{name: ocp.args.StandardSave(tree) for name, tree in items.items()})
        self._manager.save(step, args=args, metrics=metrics)

    def restore(self, step: int, placement: Placement, fresh: TrainState) -> TrainState:
        """The state of a step, on the devices.

        Args:
          fresh: that of step 0 there, whose shapes and types are wanted.

        Raises:
          CheckpointError: it is damaged, or of another model or optimizer.
        """
        like, there = placement.saved_like(fresh), self._items(step)
        wanted = {"params": like.params, "train": {"step": like.step, "opt_state": like.opt_state}}
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
        return placement.restored(TrainState(train["step"], found["params"], train["opt_state"], ema, sync))

    def restore_params(self, step: int, ema: bool = True) -> Any:
        """The parameters of a step as NumPy arrays; their moving average where there is one and `ema` is set."""
        return self._on_host(step, "ema" if ema and "ema" in self._items(step) else "params")

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
        return [p.name for p in (self._manager.directory / str(step)).iterdir()]

    @contextmanager
    def _damage(self, step: int) -> Iterator[None]:
        """Makes an error in reading a step a CheckpointError, without the tracebacks of reads that it cuts off."""
        before = _hide_cut_off()
        try:
            yield
        except Exception as error:  # of many kinds: every one means that this checkpoint is of no use here
            reason = " ".join(str(error).split())[:300]
            raise CheckpointError(f"{self._manager.directory / str(step)}: cannot be restored: {reason}") from error
        sys.unraisablehook = before  # not after an error: those reads end later

    def wait(self) -> None:
        """Returns when what was saved is on disk; raises if it could not be written."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        self._manager.close()


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
