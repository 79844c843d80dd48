"""Compares reductions of random gradients with NumPy: each stays close to the mean, and keeps what it leaves out."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.sync import Group, make_reduction
from jaxlm.sync.base import Reduction
from jaxlm.sync.int8 import BLOCK
from jaxlm.sync.packed import pack
from tests.reducing import (
    AXIS,
    EPS,
    EXACT,
    GROUPS,
    LOSSY,
    RING,
    SHARDED,
    add,
    check_same_everywhere,
    draw,
    flat,
    groups_of,
    parallel,
    reduce,
)


@pytest.mark.parametrize("zero", [0, 1])
@pytest.mark.parametrize("size, members", GROUPS)
@pytest.mark.parametrize("name", EXACT)
def test_exact_reductions_give_the_mean(name: str, size: int, members: Any, zero: int):
    group, devices = Group(AXIS, size, members), size * len(members or [0])
    grads = draw(devices, 0)
    result = reduce(parallel(name, zero=zero), group, grads)
    check_same_everywhere(result, group)
    for got, each in zip(jax.tree.leaves(result.means), jax.tree.leaves(grads), strict=True):
        for m in groups_of(group, devices):
            mean = each[m].astype(np.float64).mean(axis=0)
            # A float32 sum of n numbers is off by at most n eps times the sum of their sizes.
            bound = size * EPS * np.abs(each[m]).sum(axis=0)
            assert (np.abs(got[m[0]] - mean) <= bound).all()
    for m in groups_of(group, devices):
        squares = sum((x[m].astype(np.float64).mean(axis=0) ** 2).sum() for x in jax.tree.leaves(grads))
        assert result.norms[m[0]] == pytest.approx(math.sqrt(squares), rel=1e-5)


@pytest.mark.parametrize("zero", [0, 1])
@pytest.mark.parametrize("size, members", GROUPS[1:3])
def test_both_directions_of_the_ring_give_the_mean(size: int, members: Any, zero: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(RING, "BOTH_WAYS", 4)
    test_exact_reductions_give_the_mean("ring", size, members, zero)


def bound_of(name: str, each: np.ndarray, size: int, zero: int) -> np.ndarray:
    """Returns a strategy's largest error for each element; `each` holds the devices' gradients, [devices, l, ...]."""
    mean_size, mean = np.abs(each).mean(axis=0), np.abs(each.mean(axis=0))
    if name == "bf16":
        return 2.0**-8 * (mean_size + (0 if zero else 1) * (mean + 2.0**-8 * mean_size)) + EPS * mean_size
    if name == "fp16":
        layers = each.reshape(*each.shape[:2], -1) if each.ndim > 2 else each[:, :, None]
        largest = np.abs(layers).max(axis=(0, 2)).reshape(-1, *[1] * (each.ndim - 2))
        return size * 2.0**-11 * np.abs(each).sum(axis=0) / size * (1 + 2.0**-10) + size * 2.0**-38 * largest
    raise AssertionError(name)


@pytest.mark.parametrize("zero", [0, 1])
@pytest.mark.parametrize("size, members", GROUPS)
@pytest.mark.parametrize("name", ["bf16", "fp16"])
def test_reductions_of_16_bits_stay_within_their_bounds(name: str, size: int, members: Any, zero: int):
    group, devices = Group(AXIS, size, members), size * len(members or [0])
    grads = draw(devices, 1)
    result = reduce(parallel(name, zero=zero), group, grads)
    check_same_everywhere(result, group)
    worst = 0.0
    for key, got in flat(result.means).items():
        each = flat(grads)[key].astype(np.float64)
        stacked = each if key.startswith("layers") else each[:, None]
        for m in groups_of(group, devices):
            error = np.abs(got[m[0]] - each[m].mean(axis=0)).reshape(stacked.shape[1:])
            bound = bound_of(name, stacked[m], size, zero)
            assert (error <= bound).all(), key
            worst = max(worst, float((error / bound).max()))
    assert worst > 0.1  # a loose bound would let anything through


@pytest.mark.parametrize("scale", [1e-18, 1.0, 1e18, 1e37])  # without subnormal numbers
def test_fp16_neither_overflows_nor_underflows(scale: float):
    """Tensors may have any scale, and numbers twelve orders of magnitude apart."""
    rng = np.random.default_rng(22)
    grads = jax.tree.map(lambda x: (x * scale * 10 ** rng.uniform(-12, 0, x.shape)).astype(np.float32), draw(4, 2))
    result = reduce(parallel("fp16"), Group(AXIS, 4), grads)
    for key, got in flat(result.means).items():
        each = flat(grads)[key].astype(np.float64)
        stacked = each if key.startswith("layers") else each[:, None]
        bound = bound_of("fp16", stacked, 4, 0)
        assert (np.abs(got[0] - each.mean(axis=0)).reshape(bound.shape) <= bound).all()


@pytest.mark.parametrize("zero", [0, 1])
@pytest.mark.parametrize("size, members", [*GROUPS, (4, None)])
def test_int8_is_within_half_a_scale_for_each_rounding(size: int, members: Any, zero: int):
    group, devices = Group(AXIS, size, members), size * len(members or [0])
    grads = {"layers": {"a": draw(devices, 3, (3, 11, 70))}}  # one tensor, so that blocks are known
    result = reduce(parallel("int8", zero=zero), group, grads)
    check_same_everywhere(result, group)
    integer_sum = size <= 4 and not zero
    rows = 1 if integer_sum else size
    for m in groups_of(group, devices):
        each = np.stack([np.asarray(pack([jnp.asarray(grads["layers"]["a"][d])], rows, BLOCK)) for d in m])
        blocks = each.reshape(size, rows, -1, BLOCK).astype(np.float64)
        largest = np.abs(blocks).max(axis=3)
        if integer_sum:
            bound = largest.max(axis=0) / (127 // size) / 2
        else:
            first = largest.sum(axis=0) / 127 / 2
            sums = np.abs(blocks.sum(axis=0)).max(axis=2) + first
            bound = (first + (0 if zero else sums / 127 / 2)) / size
        got = np.asarray(pack([jnp.asarray(result.means["layers"]["a"][m[0]])], rows, BLOCK))
        error = np.abs(got.reshape(blocks.shape[1:]) - blocks.mean(axis=0)).max(axis=2)
        assert (error <= bound * (1 + 1e-4)).all() and error.max() > bound.max() / 10


@pytest.mark.parametrize("size", [2, 4, 8])
def test_topk_sends_the_largest_of_each_block(size: int):
    grads = {"layers": {"a": draw(size, 4, (1, 40, 70)), "norm": draw(size, 5, (1, 5))}, "head": draw(size, 6, (7, 9))}
    result = reduce(parallel("topk", topk_density=0.05), Group(AXIS, size), grads)
    check_same_everywhere(result, Group(AXIS, size))
    k = round(0.05 * 1024)
    want = np.zeros((3, 1024))
    for x in grads["layers"]["a"]:
        blocks = np.pad(x.ravel(), (0, 3 * 1024 - x.size)).reshape(3, 1024)
        for row, block in enumerate(blocks):
            largest = np.argsort(-np.abs(block))[:k]
            want[row, largest] += block[largest]
    got = result.means["layers"]["a"][0].ravel()
    np.testing.assert_allclose(got, want.ravel()[:2800] / size, rtol=size * EPS, atol=0)
    for got, each in ((result.means["layers"]["norm"], grads["layers"]["norm"]), (result.means["head"], grads["head"])):
        bound = size * EPS * np.abs(each).sum(axis=0)
        assert (np.abs(got[0] - each.astype(np.float64).mean(axis=0)) <= bound).all()  # sent whole


@pytest.mark.parametrize("size, members", [(8, None), (2, ((0, 3), (5, 1), (4, 2)))])
@pytest.mark.parametrize("name, zero", [("int8", 0), ("int8", 1), ("topk", 0), ("powersgd", 0)])
def test_residuals_keep_what_a_reduction_leaves_out(name: str, zero: int, size: int, members: Any):
    """After some steps, the sum of the results plus the mean of the residuals is the sum of the mean gradients."""
    group, devices = Group(AXIS, size, members), size * len(members or [0])
    state, given_out, wanted = None, None, None
    for seed in range(4):
        grads = draw(devices, 10 + seed)
        result = reduce(parallel(name, zero=zero, topk_density=0.1, powersgd_rank=4), group, grads, state)
        check_same_everywhere(result, group)
        state = result.state
        given_out = add(given_out, result.means)
        wanted = add(wanted, grads)
    kept = {key.removesuffix("/residual"): x for key, x in flat(state).items() if key.endswith("/residual")}
    assert kept
    for key, total in flat(wanted).items():
        got = flat(given_out)[key].astype(np.float64)
        for m in groups_of(group, devices):
            residual = kept[key][m].mean(axis=0).reshape(total.shape[1:]) if key in kept else 0
            largest = (
                max(np.abs(x).max() for x in (total, kept.get(key, total)))
                if name != "int8"
                else np.abs(np.concatenate([x.ravel() for x in flat(wanted).values()])).max()
            )
            error = np.abs(got[m[0]] + residual - total[m].mean(axis=0)).max()
            assert error <= 2 * size * EPS * largest, key
    assert any(np.abs(x).max() > 1000 * EPS * np.abs(flat(wanted)[key]).max() for key, x in kept.items())  # not tiny


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("size", [2, 8])
@pytest.mark.parametrize("name", [*EXACT, *LOSSY])
def test_nan_and_infinity_reach_all_devices(name: str, size: int, bad: float):
    """One such number makes the gradient's norm non-finite on all devices, and never becomes a wrong finite number."""
    grads = draw(size, 20)
    grads["layers"]["mlp"]["kernel"][1, 2, 3, 4] = bad
    result = reduce(parallel(name), Group(AXIS, size), grads)
    assert not np.isfinite(result.norms).any()


@pytest.mark.parametrize("name", [*EXACT, *LOSSY])
def test_the_norm_of_a_gradient_whose_squares_overflow_is_not_finite(name: str):
    """The step must notice a finite gradient whose squares overflow."""
    grads = jax.tree.map(lambda x: (x * 1e30).astype(np.float32), draw(2, 20))
    assert not np.isfinite(reduce(parallel(name), Group(AXIS, 2), grads).norms).any()


@pytest.mark.parametrize("name, zero", [*((name, 0) for name in (*EXACT, *LOSSY)), *((name, 1) for name in SHARDED)])
def test_buckets_change_no_more_than_rounding(name: str, zero: int):
    grads, group = draw(3, 21), Group(AXIS, 3)
    whole, cut = (reduce(parallel(name, zero=zero, bucket_mb=mb), group, grads) for mb in (0.0, 0.004))
    for key, a in flat(whole.means).items():
        b = flat(cut.means)[key]
        if name in ("int8", "topk"):  # the blocks differ: results are as near to the mean, not to each other
            mean = flat(grads)[key].astype(np.float64).mean(axis=0)
            assert np.abs(b[0] - mean).max() <= 2.5 * max(np.abs(a[0] - mean).max(), 1e-3 * np.abs(mean).max()), key
        else:
            np.testing.assert_allclose(b, a, rtol=0, atol=8 * EPS * np.abs(a).max())


def test_int8_sums_integers_on_few_cpu_devices_only():
    """Few CPU devices sum integers; more devices, and GPUs, use two phases. The tests above check both."""

    def text(r: Reduction, n: int) -> str:
        return str(jax.make_jaxpr(lambda x: r.mean([x], [r.init(x)])[0], axis_env=[(AXIS, n)])(jnp.ones((1, 600))))

    few, many = (make_reduction(parallel("int8"), Group(AXIS, n)) for n in (4, 5))
    assert "psum" in text(few, 4) and "all_to_all" not in text(few, 4)
    assert "psum" not in text(many, 5) and "all_to_all" in text(many, 5)
