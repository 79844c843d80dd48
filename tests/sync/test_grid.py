"""The groups of a grid, and how its devices divide parameters."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.config.files import BASE, load
from jaxlm.sync import Group, make_grid
from jaxlm.sync.cuts import Cut, Cuts, cut_of
from jaxlm.sync.grid import COPIES, DIRECTIONS, Grid

AXIS = "d"


def test_groups_differ_in_nothing_else():
    """Two replicas of two stages of two by three devices: neighbours are in the same tensor group."""
    grid = Grid(AXIS, (2, 2, 2, 3))
    tensor, pipeline, copies = (grid.group(*d).members for d in (["tensor"], ["pipeline"], COPIES))
    assert tensor is not None and tensor[:3] == ((0, 1, 2), (3, 4, 5), (6, 7, 8)) and len(tensor) == 8
    assert pipeline is not None and pipeline[:2] == ((0, 6), (1, 7))
    assert copies is not None and copies[:2] == ((0, 3, 12, 15), (1, 4, 13, 16))
    assert grid.everyone == Group(AXIS, 24) and grid.everyone.members is None
    assert grid.size("tensor", "pipeline") == 6 and grid.splits_model
    place = np.arange(24).reshape(2, 2, 2, 3)
    for direction in DIRECTIONS:
        members = np.array(grid.group(direction).members)
        along = DIRECTIONS.index(direction)
        assert {tuple(m) for m in members.tolist()} == {
            tuple(line) for line in np.moveaxis(place, along, -1).reshape(-1, place.shape[along]).tolist()
        }


def test_data_takes_what_is_left_and_a_plain_grid_is_one_group():
    config = load(BASE).parallel
    config.tensor = config.context = 2
    assert make_grid(config, AXIS, 8).sizes == (2, 1, 2, 2)
    plain = make_grid(load(BASE).parallel, AXIS, 8)
    assert plain.sizes == (8, 1, 1, 1) and plain.copies == plain.everyone == Group(AXIS, 8)
    assert not plain.splits_model
    found = jax.pmap(lambda _: make_grid(config, AXIS, 8).replica(), axis_name=AXIS)(np.zeros(8))
    assert found.tolist() == [0, 0, 0, 0, 1, 1, 1, 1]


@pytest.mark.parametrize(
    "whole, own, devices, cut",
    [
        ((3, 8, 12), (3, 8, 3), 4, Cut(2, 4, 3, 12)),
        ((3, 8, 12), (3, 8, 6), 4, Cut(2, 2, 6, 12)),  # two key/value heads for four devices
        ((3, 8), (3, 8), 4, Cut(0, 1, 1, 1)),
        ((29, 8), (4, 8), 8, Cut(0, 8, 4, 29)),  # three rows of padding
    ],
)
def test_a_cut_is_read_off_the_shapes(whole: Any, own: Any, devices: int, cut: Cut):
    assert cut_of(whole, own, devices) == cut


def test_whole_own_and_summed():
    """Eight devices in two groups of four: one array in four parts, one in two, one in one."""
    rng = np.random.default_rng(0)
    shapes = {"layers": {"a": (5, 3, 8), "b": (5, 4)}, "embed": {"embedding": (10, 3)}, "final_norm": {"scale": (3,)}}
    owns = {"layers": {"a": (5, 3, 4), "b": (5, 1)}, "embed": {"embedding": (3, 3)}, "final_norm": {"scale": (3,)}}

    def tree(shapes: Any, make: Any) -> Any:
        return jax.tree.map(make, shapes, is_leaf=lambda x: isinstance(x, tuple))

    like, own_like = (tree(s, lambda shape: jax.ShapeDtypeStruct(shape, jnp.float32)) for s in (shapes, owns))
    grid = Grid(AXIS, (2, 1, 1, 4))
    cuts = Cuts(grid.group("tensor"), grid.group("pipeline"), like, own_like)
    params = tree(shapes, lambda shape: rng.standard_normal(shape).astype(np.float32))
    parts = jax.pmap(lambda _: cuts.own(params), axis_name=AXIS)(np.zeros(8))
    assert jax.tree.map(lambda x: x.shape[1:], parts) == owns
    np.testing.assert_array_equal(parts["layers"]["a"][5], params["layers"]["a"][..., :4])  # shared by two neighbours
    np.testing.assert_array_equal(parts["layers"]["a"][7], params["layers"]["a"][..., 4:])
    last = np.pad(params["embed"]["embedding"][9:], ((0, 2), (0, 0)))
    np.testing.assert_array_equal(parts["embed"]["embedding"][3], last)
    back = jax.pmap(cuts.whole, axis_name=AXIS)(parts)
    jax.tree.map(lambda x, want: np.testing.assert_array_equal(x, np.broadcast_to(want, x.shape)), back, params)

    def doubled(x: jax.Array) -> jax.Array:
        return jnp.cumsum(x, axis=-1)  # of whole columns only

    path = jax.tree_util.tree_flatten_with_path(params)[0][2][0]
    acted = jax.pmap(lambda x: cuts.on_matrices(path, x, doubled), axis_name=AXIS)(parts["layers"]["a"])
    want = np.cumsum(params["layers"]["a"], axis=-1)
    np.testing.assert_allclose(acted[0], want[..., :4], rtol=1e-6)
    np.testing.assert_allclose(acted[6], want[..., 4:], rtol=1e-6)

    grads = jax.tree.map(lambda x: rng.standard_normal((8, *x.shape)).astype(np.float32), own_like)
    sums = jax.pmap(cuts.summed, axis_name=AXIS)(grads)
    np.testing.assert_array_equal(sums["layers"]["b"], grads["layers"]["b"])
    np.testing.assert_allclose(sums["layers"]["a"][4], grads["layers"]["a"][4:6].sum(axis=0), rtol=1e-6)
    np.testing.assert_allclose(sums["final_norm"]["scale"][2], grads["final_norm"]["scale"][:4].sum(axis=0), rtol=1e-5)
    squares = sum(
        np.square(x).sum() / cuts.holders(path)
        for path, x in jax.tree_util.tree_flatten_with_path(jax.tree.map(lambda x: np.asarray(x)[:4], parts))[0]
    )
    want_squares = sum(np.square(x).sum() for x in jax.tree.leaves(params))
    assert squares == pytest.approx(want_squares, rel=1e-5)
