"""The two forms of an array that devices hold in different parts: that of a checkpoint, and that of the step.

In a checkpoint an array has its natural shape, and is sharded over the grid as its `spec` says. In the step, each
device has its own block, `[devices, ...]`: its part in the tensor direction (sync/cuts.py) and, with ZeRO, of that its
part among the devices that hold the same (sync/packed.py). If the sizes divide, a block of the one is a block of the
other, and the conversion moves nothing between devices. `to_device` and `to_saved` run under `jax.shard_map` over a
mesh with the grid's directions as axes.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from jaxlm.config import Config
from jaxlm.model import Model, Params
from jaxlm.sync.base import Shape
from jaxlm.sync.cuts import Cut, cut_of
from jaxlm.sync.grid import COPIES, DIRECTIONS, Grid
from jaxlm.sync.packed import join, part_shape, split
from jaxlm.sync.zero import batch_shape, is_stacked
from jaxlm.train.one_device import of_stage, one_device
from jaxlm.train.optimizer import OF_WHOLE_MATRICES
from jaxlm.train.step import TrainState, init_sync, init_whole, sharded_fields


class Layout(NamedTuple):
    grid: Grid
    path: Any  # in the tree of a field of the state
    shape: Shape  # whole
    stages: int  # of a pipeline, over which its layers are divided; 1 = not at all
    chunks: int  # of layers that a stage has
    cut: Cut  # of what a stage has
    zero: bool  # whether the devices that hold the same have parts of it

    @property
    def _stage_shape(self) -> Shape:
        """Of what a stage has."""
        if self.stages == 1:
            return self.shape
        return self.chunks * -(-self.shape[0] // (self.stages * self.chunks)), *self.shape[1:]

    @property
    def own_shape(self) -> Shape:
        """Of what a device holds, without ZeRO."""
        cut = self.cut
        return tuple(cut.size if self.is_cut and i == cut.dim else s for i, s in enumerate(self._stage_shape))

    @property
    def device_shape(self) -> Shape:
        """Of what a device holds."""
        if not self.zero or not self.shape:
            return self.own_shape
        return part_shape(self._batch(self.own_shape), self._copies)

    @property
    def is_cut(self) -> bool:
        return self.cut.parts > 1

    @property
    def _copies(self) -> int:
        return self.grid.size(*COPIES)

    def _batch(self, shape: Shape) -> Shape:
        return batch_shape(self.path, jax.ShapeDtypeStruct(shape, jnp.float32))

    def _dims(self) -> list[int]:
        """The dimensions in which an array may be sharded, first those of a layer, which parts cut."""
        dims = range(len(self.shape))
        return [*dims[1:], *dims[:1]] if is_stacked(self.path) else [*dims]

    def _tensor_dim(self) -> int | None:
        """Where a checkpoint's array is sharded in the tensor direction: where it is cut or, if that does not divide,
        elsewhere. None = nowhere.
        """
        T = self.grid.size("tensor")
        if not self.is_cut or self.cut.parts < T:
            return None
        if self.cut.divides:
            return self.cut.dim
        return next((i for i in self._dims() if i != self.cut.dim and self.shape[i] % T == 0), None)

    @property
    def _are_neighbours(self) -> bool:
        """Whether a stage's layers are neighbours in the model, and all stages have equally many."""
        return self.chunks == 1 and self.shape[0] % self.stages == 0

    def _stages_dim(self) -> int | None:
        """Where a checkpoint's array is sharded over the stages: in layers or, if a stage's layers are not one part of
        the model, elsewhere. None = nowhere.
        """
        if self.stages == 1:
            return None
        if self._are_neighbours:
            return 0
        other = self._tensor_dim()
        return next((i for i in self._dims()[:-1] if i != other and self.shape[i] % self.stages == 0), None)

    def _copies_dim(self) -> int | None:
        """Where a checkpoint's array is sharded over the devices that hold the same. None = nowhere."""
        if not self.zero or self._copies == 1:
            return None
        parts = {self._tensor_dim(): self.grid.size("tensor")}
        parts[self._stages_dim()] = self.stages * parts.get(self._stages_dim(), 1)
        sizes = [s // parts.get(i, 1) for i, s in enumerate(self.shape)]
        return next((i for i in self._dims() if sizes[i] % self._copies == 0), None)

    def _axes(self) -> list[tuple[str, ...]]:
        """The directions over which each dimension is sharded in a checkpoint."""
        axes: list[tuple[str, ...]] = [()] * len(self.shape)
        if (dim := self._stages_dim()) is not None:
            axes[dim] += ("pipeline",)
        if (dim := self._tensor_dim()) is not None:
            axes[dim] += ("tensor",)
        if (dim := self._copies_dim()) is not None:
            axes[dim] += COPIES
        return axes

    @property
    def spec(self) -> PartitionSpec:
        """Of the array in a checkpoint."""
        return PartitionSpec(*(a or None for a in self._axes()))

    def _is_own(self) -> bool:
        """Whether a block in a checkpoint is what the device holds: parts cut the first dimension of a layer."""
        if self.stages > 1 and not self._are_neighbours:
            return False
        if self.is_cut and self._tensor_dim() != self.cut.dim:
            return False
        if not self.zero or not self.shape:
            return True
        dim, first = self._copies_dim(), int(is_stacked(self.path))
        return self._copies == 1 or (dim is not None and dim >= first and math.prod(self.own_shape[first:dim]) == 1)

    def to_device(self, block: jax.Array) -> jax.Array:
        """A device's block of the array in a checkpoint -> what the step's device holds, with a leading 1."""
        if self._is_own():
            return block.reshape(1, *self.device_shape)
        if (dim := self._copies_dim()) is not None:
            block = jax.lax.all_gather(block, COPIES, axis=dim, tiled=True)
        if self.stages > 1 and not self._are_neighbours:
            block = self._of_stage(block)
        if self.is_cut and self._tensor_dim() != self.cut.dim:
            block = self._cut(block)
        if self.zero:
            everyones = split(block.reshape(self._batch(self.own_shape)), self._copies)
            block = jax.lax.dynamic_index_in_dim(everyones, jax.lax.axis_index(COPIES), keepdims=False)
        return block[None]

    def to_saved(self, own: jax.Array) -> jax.Array:
        """The inverse of `to_device`."""
        if self._is_own():
            return own.reshape(self._block_shape())
        whole = own[0]
        if self.zero:
            parts = jax.lax.all_gather(whole, COPIES)
            whole = join(parts, self._batch(self.own_shape)).reshape(self.own_shape)
        if self.is_cut and self._tensor_dim() != self.cut.dim:
            whole = self._uncut(whole)
        if self.stages > 1 and not self._are_neighbours:
            whole = self._of_all_stages(whole)
        if (dim := self._copies_dim()) is not None:
            size = self._block_shape()[dim]
            whole = jax.lax.dynamic_slice_in_dim(whole, jax.lax.axis_index(COPIES) * size, size, dim)
        return whole

    def _block_shape(self) -> Shape:
        sizes: dict[str, int] = dict(zip(DIRECTIONS, self.grid.sizes, strict=True))
        return tuple(s // math.prod(sizes[a] for a in axes) for s, axes in zip(self.shape, self._axes(), strict=True))

    def _of_stage(self, x: jax.Array) -> jax.Array:
        """A stage's layers, of an array that has all of them, and is whole or sharded elsewhere over the stages."""
        count, dim = self._stage_shape[0], self._stages_dim()
        x = _transposed(_resized(x, 0, self.stages * count), self.chunks, self.stages)
        if dim is not None:
            return jax.lax.all_to_all(x, "pipeline", 0, dim, tiled=True)
        return jax.lax.dynamic_slice_in_dim(x, jax.lax.axis_index("pipeline") * count, count)

    def _of_all_stages(self, x: jax.Array) -> jax.Array:
        """The inverse of `_of_stage`."""
        if (dim := self._stages_dim()) is not None:
            x = jax.lax.all_to_all(x, "pipeline", dim, 0, tiled=True)
        else:
            x = jax.lax.all_gather(x, "pipeline", tiled=True)
        return _resized(_transposed(x, self.stages, self.chunks), 0, self.shape[0])

    def _cut(self, x: jax.Array) -> jax.Array:
        """This device's part of an array that is whole, or sharded in another dimension over the tensor group."""
        cut, other = self.cut, self._tensor_dim()
        x = _resized(x, cut.dim, cut.parts * cut.size)
        if other is not None:
            return jax.lax.all_to_all(x, "tensor", cut.dim, other, tiled=True)
        place = jax.lax.axis_index("tensor") * cut.parts // self.grid.size("tensor")
        return jax.lax.dynamic_slice_in_dim(x, place * cut.size, cut.size, cut.dim)

    def _uncut(self, part: jax.Array) -> jax.Array:
        """The inverse of `_cut`."""
        cut, other = self.cut, self._tensor_dim()
        if other is not None:
            x = jax.lax.all_to_all(part, "tensor", other, cut.dim, tiled=True)
        else:
            everyones = jax.lax.all_gather(part, "tensor")[:: self.grid.size("tensor") // cut.parts]
            x = jnp.concatenate(list(everyones), axis=cut.dim)
        return _resized(x, cut.dim, cut.whole)


def _transposed(layers: jax.Array, outer: int, inner: int) -> jax.Array:
    """Layers in the order (outer, inner, ...) -> (inner, outer, ...)."""
    return layers.reshape(outer, inner, -1, *layers.shape[1:]).swapaxes(0, 1).reshape(layers.shape)


def _resized(x: jax.Array, dim: int, size: int) -> jax.Array:
    """Appends zeros to a dimension, or cuts them off."""
    more = max(0, size - x.shape[dim])
    x = jnp.pad(x, [(0, more if i == dim else 0) for i in range(x.ndim)])
    return jax.lax.slice_in_dim(x, 0, size, axis=dim)


def layouts(grid: Grid, chunks: int, whole: Any, own: Any, zero: bool) -> Any:
    """The layout of each array of a tree.

    Args:
      chunks: of layers that a pipeline's stage has.
      whole, own: shapes of the arrays, and of what a device holds of them without ZeRO.
    """

    def one(path: Any, whole: Any, own: Any) -> Layout:
        has_layers = is_stacked(path) and whole.shape[:1] != own.shape[:1]  # else a placeholder of an optimizer
        stages = grid.size("pipeline") if has_layers else 1
        of_stage = (own.shape[0], *whole.shape[1:]) if stages > 1 else whole.shape
        cut = cut_of(tuple(of_stage), tuple(own.shape), grid.size("tensor"))
        return Layout(grid, path, tuple(whole.shape), stages, chunks, cut, zero)

    return jax.tree_util.tree_map_with_path(one, whole, own)


def state_layouts(config: Config, model: Model, count: int) -> dict[str, Any]:
    """The layouts of the fields of which `count` devices hold different parts, {field: tree}."""
    device = one_device(config, model, count)

    def state(params: Params) -> TrainState:
        return jax.eval_shape(lambda params: init_whole(config, params), params)

    whole, own = state(model.shapes()), state(device.params)
    if config.optim.name in OF_WHOLE_MATRICES:
        own = own._replace(opt_state=state(of_stage(config.parallel, model.shapes())).opt_state)
    zero = (config.parallel.zero > 0) * ("opt_state",) + (config.parallel.zero > 2) * ("params", "ema")
    there = [f for f in sharded_fields(config) if getattr(whole, f) is not None]
    return {
        f: layouts(device.grid, config.parallel.chunks, getattr(whole, f), getattr(own, f), f in zero) for f in there
    }


def step_shapes(config: Config, model: Model, count: int) -> TrainState:
    """The shapes of a state as the step of `count` devices takes it."""
    whole = jax.eval_shape(lambda params: init_whole(config, params), model.shapes())
    fields = {}
    for field, tree in state_layouts(config, model, count).items():
        fields[field] = jax.tree.map(
            lambda layout, x: jax.ShapeDtypeStruct((count, *layout.device_shape), x.dtype),
            tree,
            getattr(whole, field),
            is_leaf=is_layout,
        )
    return whole._replace(**fields, sync=jax.eval_shape(lambda: init_sync(config, model, count)))


def is_layout(x: Any) -> bool:
    return isinstance(x, Layout)
