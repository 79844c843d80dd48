"""PowerSGD recovers a mean of low rank, improves with a warm start, and does not compress vectors."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.sync import Group
from jaxlm.sync.powersgd import orthonormal, powersgd
from tests.reducing import AXIS, EPS, check_same_everywhere, draw, parallel, reduce


@pytest.mark.parametrize("size", [2, 3, 8])
def test_powersgd_recovers_a_mean_of_low_rank(size: int):
    """The devices' own matrices have full rank. Their mean has rank 3, and one step recovers it.

    The first P is a random combination of the mean's columns, so one step is enough to find their space.
    """
    rng = np.random.default_rng(5)
    low = rng.normal(size=(2, 30, 3)) @ rng.normal(size=(2, 3, 40))
    noise = rng.normal(size=(size, 2, 30, 40))
    each = (low + noise - noise.mean(axis=0)).astype(np.float32)
    grads = {"layers": {"a": each, "norm": draw(size, 6, (2, 5))}}
    config = parallel("powersgd", powersgd_rank=3)
    result = reduce(config, Group(AXIS, size), grads)
    check_same_everywhere(result, Group(AXIS, size))
    np.testing.assert_allclose(result.means["layers"]["a"][0], low, rtol=0, atol=1e-5 * np.abs(low).max())
    # Vectors are averaged as they are.
    norm = grads["layers"]["norm"].astype(np.float64).mean(axis=0)
    np.testing.assert_allclose(result.means["layers"]["norm"][0], norm, rtol=0, atol=size * EPS * np.abs(norm).max())
    assert result.state["layers"]["norm"] == {}


def test_powersgd_improves_with_a_warm_start():
    """With the same gradient again and no residual, the error falls to that of the SVD, the best of this rank."""
    each = np.random.default_rng(7).normal(size=(2, 30, 40)).astype(np.float32)
    grads = {"layers": {"a": np.stack([each[:1], each[:1]])}}
    config = parallel("powersgd", powersgd_rank=4)
    u, s, v = np.linalg.svd(each[0].astype(np.float64))
    best = np.linalg.norm(each[0] - (u[:, :4] * s[:4]) @ v[:4])
    state, errors = None, []
    for _ in range(30):
        result = reduce(config, Group(AXIS, 2), grads, state)
        errors.append(np.linalg.norm(result.means["layers"]["a"][0, 0] - each[0]))
        kept = result.state["layers"]["a"]
        state = {"layers": {"a": kept | {"residual": 0 * kept["residual"]}}}
    assert errors[0] > 1.05 * best and errors[-1] < 1.01 * best
    assert all(b <= a * (1 + 1e-6) for a, b in itertools.pairwise(errors))


def test_powersgd_recovers_from_a_gradient_of_zero():
    """In the first step of training the gradients of all layers are zero, because the output layer is zero."""
    grads, config = draw(2, 8, {"layers": {"a": (1, 30, 40)}}), parallel("powersgd")
    zeros = jax.tree.map(np.zeros_like, grads)
    state = reduce(config, Group(AXIS, 2), zeros).state
    result = reduce(config, Group(AXIS, 2), grads, state)
    mean = result.means["layers"]["a"]
    assert np.abs(mean).max() > 0
    fresh = reduce(config, Group(AXIS, 2), grads)  # its Q has columns of other lengths, but of the same space
    wanted = fresh.means["layers"]["a"]
    np.testing.assert_allclose(mean, wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())


def test_orthonormal_replaces_dependent_columns_by_zeros():
    p = np.random.default_rng(9).normal(size=(3, 20, 5)).astype(np.float32)
    p[1, :, 3] = p[1, :, 0] - 2 * p[1, :, 2]
    p[2] = 0
    p *= np.array([1e-30, 1, 1], np.float32)[:, None, None]  # columns of any size
    q = np.asarray(orthonormal(jnp.asarray(p)), np.float64)
    wanted = np.stack([np.eye(5), np.diag([1, 1, 1, 0, 1]), np.zeros((5, 5))])
    np.testing.assert_allclose(q.swapaxes(1, 2) @ q, wanted, rtol=0, atol=1e-5)
    largest = np.abs(p).max(axis=(1, 2), keepdims=True)
    assert (np.abs(q @ (q.swapaxes(1, 2) @ p) - p) <= 1e-5 * largest).all()  # the same space


def test_powersgd_compresses_only_matrices():
    r = powersgd(Group(AXIS, 2), 4)
    assert r.init(jnp.zeros((3, 20, 30))).keys() == {"residual", "q"}
    for shape in ((3, 20), (1, 20), (3, 7, 8), (1, 4, 1000)):  # vectors, and matrices that 4 columns would not shorten
        assert r.init(jnp.zeros(shape)) == {}
    assert r.sent_bytes([(3, 20, 30), (3, 20), (3, 7, 8)], False) == 4 * (3 * 4 * 50 + 60 + 3 * 56)
