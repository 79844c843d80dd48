"""Checkpoints with Orbax: written in the background, visible only when whole; the newest and the best are kept.

A checkpoint is three items: `params`, `ema` (where there is one) and `train` (step, optimizer and synchronization
state). The place in the data needs no saving: batch N is a function of the configuration and N.
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
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, BestN, LatestN

from jaxlm.config import CheckpointConfig
from jaxlm.step import AXIS, STATE_AXES, Device, TrainState

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
            item_handlers={item: ocp.StandardCheckpointHandler() for item in ("params", "ema", "train")},
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
        """Starts to write the state; it may be donated as soon as this returns. A step that is there is left alone."""
        if step == self.latest():
            return
        state = _globalize(state)
        if jax.default_backend() == "cpu":
            # There Orbax reads the arrays themselves while the loop goes on, and the next step writes over donated
            # ones; from GPUs it takes a copy to the host anyway.
            state = jax.tree.map(jnp.copy, state)
        items = {
            "params": ocp.args.StandardSave(state.params),
            "train": ocp.args.StandardSave({"step": state.step, "opt_state": state.opt_state, "sync": state.sync}),
        }
        if state.ema is not None:
            items["ema"] = ocp.args.StandardSave(state.ema)
        metrics = None if eval_loss is None else {"eval_loss": eval_loss}
        self._manager.save(step, args=ocp.args.Composite(**items), metrics=metrics)

    def restore(self, step: int, like: TrainState) -> TrainState:
        """The state of a step, with the shapes, types and placement of `like`.

        Raises:
          CheckpointError: it is damaged, or of another model or optimizer.
        """
        target = _globalize(like)
        items = {
            "params": ocp.args.StandardRestore(_abstract(target.params)),
            "train": ocp.args.StandardRestore(
                _abstract({"step": target.step, "opt_state": target.opt_state, "sync": target.sync})
            ),
        }
        if like.ema is not None and "ema" in self._items(step):
            items["ema"] = ocp.args.StandardRestore(_abstract(target.ema))
        with self._damage(step):
            found = self._manager.restore(step, args=ocp.args.Composite(**items))
        train, ema = found["train"], found["ema"] if "ema" in items else None
        if like.ema is not None and ema is None:  # the average starts now
            ema = jax.tree.map(jnp.copy, found["params"])
        return _localize(TrainState(train["step"], found["params"], train["opt_state"], ema, train["sync"]), like)

    def restore_params(self, step: int, ema: bool = True) -> Any:
        """The parameters of a step as NumPy arrays; their moving average where there is one and `ema` is set."""
        item = "ema" if ema and "ema" in self._items(step) else "params"
        # With a place of their own, since the devices that saved them need not be here.
        here = SingleDeviceSharding(jax.local_devices()[0])
        with self._damage(step):
            meta = self._manager.item_metadata(step)[item]
            if meta is None:
                raise ValueError(f"it has no {item}")
            like = jax.tree.map(lambda m: jax.ShapeDtypeStruct(m.shape, m.dtype, sharding=here), meta.tree)
            found = self._manager.restore(step, args=ocp.args.Composite(**{item: ocp.args.StandardRestore(like)}))
        return jax.device_get(found[item])

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


def _abstract(tree: Any) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


def _specs(state: TrainState) -> TrainState:
    parts = [PartitionSpec() if axis is None else PartitionSpec(AXIS) for axis in STATE_AXES]
    return TrainState(*(jax.tree.map(lambda _, p=part: p, sub) for part, sub in zip(parts, state, strict=True)))


def _globalize(state: TrainState) -> TrainState:
    """With several processes pmap holds host-local arrays; Orbax wants arrays of all processes."""
    if jax.process_count() == 1:
        return state
    mesh = Mesh(np.array(jax.devices()), (AXIS,))
    return multihost_utils.host_local_array_to_global_array(state, mesh, _specs(state))


def _localize(state: TrainState, like: TrainState) -> TrainState:
    if jax.process_count() > 1:
        mesh = Mesh(np.array(jax.devices()), (AXIS,))
        state = multihost_utils.global_array_to_host_local_array(state, mesh, _specs(state))
    return jax.tree.map(lambda x, l: jax.device_put(x, l.sharding), state, like)


def place(state: TrainState, local_devices: list[Device]) -> TrainState:
    """Puts a state on this host's devices the way the step keeps it there, so that donation finds it in place."""
    mesh = Mesh(np.array(local_devices), (AXIS,))
    shardings = jax.tree.map(
        lambda p: NamedSharding(mesh, p), _specs(state), is_leaf=lambda p: isinstance(p, PartitionSpec)
    )
    return jax.device_put(state, shardings)
