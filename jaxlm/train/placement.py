"""Converts a state between the form of the step and the form of a checkpoint, which any grid of devices can read.

The step takes arrays on this process's devices, as pmap does; a checkpoint holds arrays of all processes. Where devices
hold different parts of a field, each has its own in the step, `[devices, ...]`. In a checkpoint all arrays have their
natural shapes, and are sharded over the grid (layout.py). The state of a reduction has one row per device, in both.
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
from jaxlm.sync.grid import DIRECTIONS
from jaxlm.train import trained
from jaxlm.train.layout import is_layout, state_layouts
from jaxlm.train.one_device import AXIS, one_device
from jaxlm.train.step import Device, TrainState, init_params, init_sync, init_whole, spread, state_axes


class Placement:
    """The placement of a state on `devices`, which are those of all processes."""

    def __init__(self, config: Config, model: Model, devices: list[Device]):
        self._config, self._model, self._devices = config, model, devices
        self.local = [d for d in devices if d.process_index == jax.process_index()]
        self._mesh, self.here = Mesh(np.array(devices), (AXIS,)), Mesh(np.array(self.local), (AXIS,))
        everywhere = NamedSharding(self._mesh, PartitionSpec())
        self._gather = together.compiled(jax.jit(lambda x: x, out_shardings=everywhere), "an array as a whole")
        self._row = together.compiled(jax.jit(lambda x, i: x[i], out_shardings=everywhere), "a row of an array")
        self.batch = NamedSharding(self.here, PartitionSpec(AXIS))  # of a batch [local devices, ...]
        self.replicated = NamedSharding(self.here, PartitionSpec())

        # Shapes of the whole state, without that of the reduction, and the fields that devices have in parts.
        self.whole = jax.eval_shape(lambda params: init_whole(config, params), model.shapes())
        grid = one_device(config, model, len(devices)).grid
        self._grid = Mesh(np.array(devices).reshape(grid.sizes), DIRECTIONS)
        self._layouts = state_layouts(config, model, len(devices))
        self._join = together.compiled(self._converter(self._layouts, back=True), "the state as a whole")
        self._spread = self._converter(self._layouts)
        self._gathering = model.having(on_layer=lambda layer, _: jax.lax.with_sharding_constraint(layer, everywhere))

    @property
    def in_parts(self) -> bool:
        """Whether devices hold different parts of the parameters."""
        return "params" in self._layouts

    def initial(self) -> TrainState:
        """Makes the initial state, on the devices. Fields that are in parts are never whole on one device."""
        if self.in_parts:
            return self.restored(self.initial_program()(jax.random.key(self._config.seed)))
        params = init_params(self._config, self._model)
        first, count = self._devices.index(self.local[0]), len(self._devices)

        def rest(params: Params) -> TrainState:
            state = spread(self._config, init_whole(self._config, params), count)
            state = state._replace(params=None, sync=init_sync(self._config, self._model, count))
            rows = slice(first, first + len(self.local))
            parts: list[Any] = [
                part if axis is None else jax.tree.map(lambda x: x[rows], part)
                for axis, part in zip(state_axes(self._config), state, strict=True)
            ]
            return TrainState(*parts)

        like = jax.eval_shape(rest, params)
        state = jax.jit(rest, out_shardings=self._shardings(like, self.here))(params)
        return state._replace(params=jax.device_put(params, self.replicated))

    def initial_program(self) -> Callable[[jax.Array], TrainState]:
        """Returns the compiled function (key) -> initial state in the form of a checkpoint, made where it lives."""

        def whole(key: jax.Array) -> TrainState:
            params = self._model.init(key)
            state = init_whole(self._config, params)
            return state._replace(sync=init_sync(self._config, self._model, len(self._devices)))

        return jax.jit(whole, out_shardings=self._saved_shardings(jax.eval_shape(whole, jax.random.key(0))))

    def place(self, state: TrainState) -> TrainState:
        """Puts this process's part of a state on its devices as the step expects it, so that the step can donate it."""
        return jax.device_put(state, self._shardings(state, self.here))

    def place_params(self, params: Params) -> Params:
        """Puts whole parameters, or some of them, on the devices as the step expects them."""
        if not self.in_parts:
            return jax.device_put(params, self.replicated)
        some = trained.within(self._layouts["params"], params)
        put = jax.device_put(params, self._natural(some))
        return self._to_local(self._converter(some)(put), PartitionSpec(AXIS))

    def for_sampling(self, params: Params) -> tuple[Model, Params]:
        """The model with parameters of a state, for computation outside the mapped step: on one device or, if devices
        hold parts, on all of them, which gather one layer at a time. Then all processes must call the same functions.
        """
        if not self.in_parts:
            return self._model, jax.tree.map(lambda x: x.addressable_shards[0].data, params)
        join = self._converter(self._layouts["params"], back=True)
        return self._gathering, join(self._to_global(params, PartitionSpec(AXIS)))

    def everywhere(self, state: TrainState) -> TrainState:
        """Returns the state as arrays of all processes."""
        return self._to_global(state, jax.tree.map(lambda s: s.spec, self._shardings(state, self._mesh)))

    def saved(self, state: TrainState) -> TrainState | None:
        """Returns the state as a checkpoint holds it. All processes call this. If there are several, the first one gets
        the whole state as NumPy arrays, and the others get None.
        """
        state = self.everywhere(state)
        if self._layouts:
            state = state._replace(**self._join({field: getattr(state, field) for field in self._layouts}))
        return state if jax.process_count() == 1 else self._gathered(state)

    def _gathered(self, state: TrainState) -> TrainState | None:
        """Gathers a state of all processes as NumPy arrays on the first one; the others get None.

        It gathers one array at a time, and of stacked ones a layer at a time, so that no device holds much more than
        its part.
        """
        first = jax.process_index() == 0

        def fetch(x: jax.Array) -> np.ndarray:
            x = x if x.is_fully_replicated else self._gather(x)
            jax.block_until_ready(x)  # with two programs at once, hosts might exchange in different orders
            # A copy, because the next step overwrites the array.
            return np.array(x.addressable_data(0)) if first else np.empty(0)

        def rows(x: jax.Array) -> np.ndarray:
            return np.stack([fetch(self._row(x, np.int32(i))) for i in range(x.shape[0])])

        def fetch_layers(path: Any, x: jax.Array) -> np.ndarray:
            by_rows = zero.is_stacked(path) and not x.is_fully_replicated and x.ndim > 1
            return rows(x) if by_rows else fetch(x)

        sync = jax.tree.map(rows, state.sync)
        rest = jax.tree_util.tree_map_with_path(fetch_layers, state._replace(sync=None))
        return rest._replace(sync=sync) if first else None

    def saved_like(self, state: TrainState) -> TrainState:
        """Returns shapes, dtypes and shardings of a checkpoint's arrays, over the devices of all processes."""
        count = jax.process_count()
        sync = jax.tree.map(lambda x: jax.ShapeDtypeStruct((x.shape[0] * count, *x.shape[1:]), x.dtype), state.sync)
        like = self.whole._replace(sync=sync)
        return jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), like, self._saved_shardings(like)
        )

    def restored(self, saved: TrainState) -> TrainState:
        """The inverse of `saved`."""
        if self._layouts:
            saved = saved._replace(**self._spread({field: getattr(saved, field) for field in self._layouts}))
        return self.place(self._to_local(saved, jax.tree.map(lambda s: s.spec, self._shardings(saved, self._mesh))))

    def _to_local(self, tree: Any, specs: Any) -> Any:
        """Arrays of all processes -> of this one."""
        if jax.process_count() == 1:
            return tree
        return multihost_utils.global_array_to_host_local_array(tree, self._mesh, specs)

    def _to_global(self, tree: Any, specs: Any) -> Any:
        """The inverse of `_to_local`."""
        if jax.process_count() == 1:
            return tree
        return multihost_utils.host_local_array_to_global_array(tree, self._mesh, specs)

    def _shardings(self, state: TrainState, mesh: Mesh) -> TrainState:
        """In the form of the step."""
        specs = [PartitionSpec() if axis is None else PartitionSpec(AXIS) for axis in state_axes(self._config)]
        return TrainState(
            *(jax.tree.map(lambda _, s=s: NamedSharding(mesh, s), part) for s, part in zip(specs, state, strict=True))
        )

    def _saved_shardings(self, like: TrainState) -> TrainState:
        """In the form of a checkpoint, on the devices of all processes."""
        return self._shardings(like, self._mesh)._replace(**self._natural(self._layouts))

    def _natural(self, layouts: Any) -> Any:
        """The shardings of arrays in a checkpoint."""
        return jax.tree.map(lambda layout: NamedSharding(self._grid, layout.spec), layouts, is_leaf=is_layout)

    def _converter(self, layouts: Any, back: bool = False) -> Callable[[Any], Any]:
        """Compiles (tree of arrays in the form of a checkpoint) -> the same in the form of the step, or `back`."""
        natural = jax.tree.map(lambda layout: layout.spec, layouts, is_leaf=is_layout)
        rows = jax.tree.map(lambda layout: PartitionSpec(DIRECTIONS), layouts, is_leaf=is_layout)

        def convert(tree: Any) -> Any:
            return jax.tree.map(
                lambda layout, x: (layout.to_saved if back else layout.to_device)(x), layouts, tree, is_leaf=is_layout
            )

        specs = {"in_specs": (rows if back else natural,), "out_specs": natural if back else rows}
        return jax.jit(jax.shard_map(convert, mesh=self._grid, **specs, check_vma=False))
