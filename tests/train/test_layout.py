"""Arrays on their way from a checkpoint to the devices of a grid and back, also of sizes that do not divide."""

from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxlm.sync.cuts import cut_of
from jaxlm.sync.grid import DIRECTIONS, Grid
from jaxlm.train.layout import Layout

LAYERS = (jax.tree_util.DictKey("layers"), jax.tree_util.DictKey("kernel"))
TABLE = (jax.tree_util.DictKey("embed"), jax.tree_util.DictKey("embedding"))
# sizes of the grid, path, shape, shape without ZeRO, ZeRO, chunks of a stage
CASES = [
    ((2, 1, 1, 4), LAYERS, (3, 8, 12), (3, 8, 3), False, 1),
    ((2, 1, 1, 4), LAYERS, (3, 8, 12), (3, 8, 3), True, 1),  # a block is a part: nothing moves
    ((2, 1, 1, 4), LAYERS, (3, 8, 12), (3, 2, 12), True, 1),
    ((2, 1, 1, 4), LAYERS, (3, 5, 8), (3, 5, 4), True, 1),  # two parts for four devices
    ((4, 1, 1, 2), TABLE, (29, 6), (15, 6), True, 1),  # sharded elsewhere in a checkpoint, padded on devices
    ((4, 1, 1, 2), TABLE, (29, 5), (15, 5), False, 1),  # nothing divides
    ((2, 2, 1, 2), LAYERS, (4, 6, 4), (2, 6, 2), True, 1),
    ((2, 2, 2, 1), LAYERS, (8, 3, 7), (4, 3, 7), True, 2),  # chunks, and an odd number of numbers
    ((2, 2, 1, 2), LAYERS, (5, 6, 4), (3, 6, 2), True, 1),  # the last stage has a layer less
    ((1, 4, 1, 2), LAYERS, (7, 6, 8), (2, 6, 4), False, 1),  # no dimension divides over the stages
    ((2, 2, 1, 2), LAYERS, (7, 6, 4), (4, 3, 4), True, 2),
    ((2, 2, 1, 2), LAYERS, (5,), (3,), True, 1),
    ((8, 1, 1, 1), LAYERS, (16, 3, 5), (16, 3, 5), True, 1),
    ((2, 2, 2, 1), (), (), (), True, 1),
]


@pytest.mark.parametrize("sizes, path, shape, own, zero, chunks", CASES)
def test_there_and_back(sizes: Any, path: Any, shape: Any, own: Any, zero: bool, chunks: int):
    grid = Grid("d", sizes)
    stages = sizes[1] if path == LAYERS else 1
    of_stage = (own[0], *shape[1:]) if stages > 1 else shape
    layout = Layout(grid, path, shape, stages, chunks, cut_of(of_stage, own, sizes[3]), zero)
    x = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    mesh = Mesh(np.array(jax.devices()[:8]).reshape(sizes), DIRECTIONS)
    rows = PartitionSpec(DIRECTIONS)
    specs: dict[str, Any] = {"mesh": mesh, "check_vma": False}
    there = jax.jit(jax.shard_map(layout.to_device, in_specs=layout.spec, out_specs=rows, **specs))
    back = jax.jit(jax.shard_map(layout.to_saved, in_specs=rows, out_specs=layout.spec, **specs))
    saved = jax.device_put(x, NamedSharding(mesh, layout.spec))
    held = there(saved)
    assert held.shape == (8, *layout.device_shape)
    np.testing.assert_array_equal(held, [expected(x, layout, i) for i in range(8)])
    again = back(held)
    np.testing.assert_array_equal(again, x)
    assert again.sharding.is_equivalent_to(saved.sharding, x.ndim)


def expected(x: np.ndarray, layout: Layout, device: int) -> np.ndarray:
    """What a device holds, cut in NumPy."""
    d, p, c, t = np.unravel_index(device, layout.grid.sizes)
    if layout.stages > 1:
        size = -(-len(x) // (layout.stages * layout.chunks))
        x = np.pad(x, [(0, layout.stages * layout.chunks * size - len(x)), *[(0, 0)] * (x.ndim - 1)])
        x = np.concatenate([x[(v * layout.stages + p) * size :][:size] for v in range(layout.chunks)])
    cut = layout.cut
    if cut.parts > 1:
        x = np.pad(x, [(0, cut.parts * cut.size - cut.whole if i == cut.dim else 0) for i in range(x.ndim)])
        x = np.split(x, cut.parts, axis=cut.dim)[t * cut.parts // layout.grid.sizes[3]]
    if layout.zero and x.ndim:
        copies, part = layout.grid.size("data", "context"), d * layout.grid.sizes[2] + c
        flat = x.reshape(len(x) if layout.path == LAYERS else 1, -1)
        flat = np.pad(flat, ((0, 0), (0, -flat.shape[1] % copies)))
        x = np.split(flat, copies, axis=1)[part]
    return x


def test_blocks_that_are_parts_do_not_move():
    """If the sizes divide, the conversion has no collective."""
    grid = Grid("d", (2, 2, 1, 2))
    layout = Layout(grid, LAYERS, (4, 6, 4), 2, 1, cut_of((2, 6, 4), (2, 6, 2), 2), True)
    mesh = Mesh(np.array(jax.devices()[:8]).reshape(grid.sizes), DIRECTIONS)
    convert = jax.shard_map(
        layout.to_device, mesh=mesh, in_specs=layout.spec, out_specs=PartitionSpec(DIRECTIONS), check_vma=False
    )
    x = jax.ShapeDtypeStruct(layout.shape, np.float32, sharding=NamedSharding(mesh, layout.spec))
    text = jax.jit(convert).lower(x).compile().as_text() or ""
    assert not any(word in text for word in ("all-gather", "all-to-all", "collective-permute", "all-reduce"))
