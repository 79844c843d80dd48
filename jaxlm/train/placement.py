"""Converts a state between the form of the step and the form of a checkpoint, which any number of devices can read.

The step takes arrays on this process's devices, as pmap does; a checkpoint holds arrays of all processes. In a
checkpoint the optimizer state is whole, even with ZeRO-1, and the state of a reduction has one row per device.
"""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxlm.config import Config
from jaxlm.host import together
from jaxlm.model import Model, Params
from jaxlm.sync import zero
from jaxlm.train import trained
from jaxlm.train.optimizer import make_optimizer
from jaxlm.train.step import AXIS, Device, TrainState, float32, init_params, init_rest, state_axes


class Placement:
    """The placement of a state on `devices`, which are those of all processes."""

    def __init__(self, config: Config, devices: list[Device]):
        self._config, self._devices = config, devices
        self._zero = config.parallel.zero == 1
        self._join: Callable | None = None  # compiled: parts of the optimizer state -> the whole
        self.local = [d for d in devices if d.process_index == jax.process_index()]
        self._mesh, self.here = Mesh(np.array(devices), (AXIS,)), Mesh(np.array(self.local), (AXIS,))
        everywhere = NamedSharding(self._mesh, PartitionSpec())
        self._gather = together.compiled(jax.jit(lambda x: x, out_shardings=everywhere), "an array as a whole")
        self._row = together.compiled(jax.jit(lambda x, i: x[i], out_shardings=everywhere), "a row of an array")
        self.batch = NamedSharding(self.here, PartitionSpec(AXIS))  # of a batch [local devices, ...]
        self.replicated = NamedSharding(self.here, PartitionSpec())

    def initial(self, model: Model) -> TrainState:
        """Makes the initial state, on the devices."""
        params = init_params(self._config, model)
        first = self._devices.index(self.local[0])

        def rest(params: Params) -> TrainState:
            state, axes = init_rest(self._config, params, len(self._devices)), state_axes(self._config)
            rows = slice(first, first + len(self.local))
            parts: list[Any] = [
                part if axis is None else jax.tree.map(lambda x: x[rows], part)
                for axis, part in zip(axes, state, strict=True)
            ]
            return TrainState(*parts)

        # The state is made in its final place: one that is too large for a single device is never whole on one.
        like = jax.eval_shape(rest, params)
        state = jax.jit(rest, out_shardings=self._shardings(like, self.here))(params)
        return state._replace(params=jax.device_put(params, self.replicated))

    def place(self, state: TrainState) -> TrainState:
        """Puts this process's part of a state on its devices as the step expects it, so that the step can donate it."""
        return jax.device_put(state, self._shardings(state, self.here))

    def everywhere(self, state: TrainState) -> TrainState:
        """Returns the state as arrays of all processes."""
        if jax.process_count() == 1:
            return state
        specs = jax.tree.map(lambda s: s.spec, self._shardings(state, self._mesh))
        return multihost_utils.host_local_array_to_global_array(state, self._mesh, specs)

    def saved(self, state: TrainState) -> TrainState | None:
        """Returns the state as a checkpoint holds it. All processes call this. If there are several, the first one gets
        the whole state as NumPy arrays, and the others get None.
        """
        state = self.everywhere(state)
        if self._zero:
            if self._join is None:  # compiled once, not at every save
                like = self._opt_state_like(state.params)
                join = jax.jit(lambda parts: zero.joined(parts, like), out_shardings=self._spread(like))
                self._join = together.compiled(join, "the optimizer's state as a whole")
            state = state._replace(opt_state=self._join(state.opt_state))
        return state if jax.process_count() == 1 else self._gathered(state)

    def _gathered(self, state: TrainState) -> TrainState | None:
        """Gathers a state of all processes as NumPy arrays on the first one; the others get None.

        It gathers one array at a time, so that no device holds much more than its part.
        """
        first = jax.process_index() == 0

        def fetch(x: jax.Array) -> np.ndarray:
            x = x if x.is_fully_replicated else self._gather(x)
            jax.block_until_ready(x)  # with two programs at once, hosts might exchange in different orders
            # A copy, because the next step overwrites the array.
            return np.array(x.addressable_data(0)) if first else np.empty(0)

        def rows(x: jax.Array) -> np.ndarray:
            return np.stack([fetch(self._row(x, np.int32(i))) for i in range(x.shape[0])])

        sync = jax.tree.map(rows, state.sync)
        rest = jax.tree.map(fetch, state._replace(sync=None))
        return rest._replace(sync=sync) if first else None

    def saved_like(self, state: TrainState) -> TrainState:
        """Returns shapes, dtypes and shardings of a checkpoint's arrays, over the devices of all processes."""
        counts = {None: 1, 0: jax.process_count()}
        axes, shardings = state_axes(self._config), self._shardings(state, self._mesh)

        def like(axis: Any, x: Any, sharding: Any) -> Any:
            rows = () if axis is None else (x.shape[0] * counts[axis],)
            return jax.ShapeDtypeStruct((*rows, *x.shape[len(rows) :]), x.dtype, sharding=sharding)

        found = TrainState(
            *(
                jax.tree.map(lambda x, s, a=a: like(a, x, s), part, places)
                for a, part, places in zip(axes, state, shardings, strict=True)
            )
        )
        if self._zero:
            whole = self._opt_state_like(state.params)
            found = found._replace(
                opt_state=jax.tree.map(
                    lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), whole, self._spread(whole)
                )
            )
        return found

    def restored(self, saved: TrainState) -> TrainState:
        """The inverse of `saved`."""
        if self._zero:
            n = len(self._devices)
            spread = jax.jit(lambda x: zero.spread(x, n), out_shardings=NamedSharding(self._mesh, PartitionSpec(AXIS)))
            saved = saved._replace(opt_state=spread(saved.opt_state))
        if jax.process_count() > 1:
            specs = jax.tree.map(lambda s: s.spec, self._shardings(saved, self._mesh))
            saved = multihost_utils.global_array_to_host_local_array(saved, self._mesh, specs)
        return self.place(saved)

    def _shardings(self, state: TrainState, mesh: Mesh) -> TrainState:
        specs = [PartitionSpec() if axis is None else PartitionSpec(AXIS) for axis in state_axes(self._config)]
        return TrainState(
            *(jax.tree.map(lambda _, s=s: NamedSharding(mesh, s), part) for s, part in zip(specs, state, strict=True))
        )

    def _opt_state_like(self, params: Params) -> Any:
        own = trained.part(self._config, params)
        return jax.eval_shape(lambda p: make_optimizer(self._config.optim, self._config.steps).init(float32(p)), own)

    def _spread(self, like: Any) -> Any:
        """Shards each array along its first dimension that the devices divide, else replicates it."""

        def sharding(x: Any) -> NamedSharding:
            for i, size in enumerate(x.shape):
                if size % len(self._devices) == 0:
                    return NamedSharding(self._mesh, PartitionSpec(*[None] * i, AXIS))
            return NamedSharding(self._mesh, PartitionSpec())

        return jax.tree.map(sharding, like)
