"""Ring attention of shared sequences equals attention of whole ones, with its gradients."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.model import ring_blocks
from jaxlm.model.attention import Scores, in_chunks, offset_keys
from jaxlm.model.context import Context
from jaxlm.model.ring import ring_attention

B, S, H, K, C = 2, 24, 4, 2, 6
AXIS = "ring"


def context(size: int) -> Context:
    def shift(x: jax.Array, by: int) -> jax.Array:
        return jax.lax.ppermute(x, AXIS, [(i, (i + by) % size) for i in range(size)])

    return Context(size, lambda: jax.lax.axis_index(AXIS), shift)


def places(size: int) -> np.ndarray:
    """The places of each device's tokens, [size, S / size]."""
    chunks = np.arange(S).reshape(2 * size, -1)
    return np.stack([np.concatenate([chunks[i], chunks[2 * size - 1 - i]]) for i in range(size)])


def shared(x: np.ndarray, size: int) -> np.ndarray:
    """[B, S, ...] -> [size, B, S / size, ...]"""
    return np.stack([x[:, own] for own in places(size)])


def whole(x: jax.Array, size: int) -> np.ndarray:
    found = np.empty((B, S, *x.shape[3:]), np.float32)
    for own, part in zip(places(size), np.asarray(x), strict=True):
        found[:, own] = part
    return found


def draw() -> tuple[Any, np.ndarray]:
    rng = np.random.default_rng(0)
    q, g = rng.standard_normal((2, B, S, H, C)).astype(np.float32)
    k, v = rng.standard_normal((2, B, S, K, C)).astype(np.float32)
    return (q, k, v), g


@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize(
    "window, softcap, packed, queries",
    [(0, 0.0, False, 1024), (7, 2.0, False, 2), (0, 0.0, True, 3), (3, 0.0, True, 1024)],
)
def test_it_equals_attention_of_whole_sequences(
    size: int, window: int, softcap: float, packed: bool, queries: int, monkeypatch: pytest.MonkeyPatch
):
    """Also with a few queries at a time, whose scores alone are in memory."""
    monkeypatch.setattr(ring_blocks, "QUERIES", queries)
    qkv, g = draw()
    segments = np.cumsum(np.random.default_rng(1).random((B, S)) < 0.2, axis=1).astype(np.int32) if packed else None
    scores = Scores(C**-0.5, softcap, window)
    blocks = ring_blocks.by_xla(scores)

    def plain(q: Any, k: Any, v: Any) -> jax.Array:
        return jnp.sum(in_chunks(q, k, v, scores, None if segments is None else jnp.asarray(segments)) * g)

    def on_ring(q: Any, k: Any, v: Any, segments: Any, g: Any) -> jax.Array:
        return jnp.sum(ring_attention(context(size), q, k, v, blocks, window or S, segments) * g)

    parts = [shared(x, size) for x in qkv], None if segments is None else shared(segments, size), shared(g, size)
    axes = (0, 0, 0, None if segments is None else 0, 0)
    run = jax.jit(jax.vmap(jax.value_and_grad(on_ring, (0, 1, 2)), axes, axis_name=AXIS))
    sums, grads = run(*parts[0], *parts[1:])
    want, want_grads = jax.jit(jax.value_and_grad(plain, (0, 1, 2)))(*qkv)
    np.testing.assert_allclose(np.sum(sums), want, rtol=2e-6, atol=1e-5)
    for got, expected in zip(grads, want_grads, strict=True):
        np.testing.assert_allclose(whole(got, size), expected, rtol=0, atol=2e-6 * np.abs(expected).max())


@pytest.mark.parametrize("size", [2, 3])
def test_the_previous_key_may_be_on_another_device(size: int):
    (_, k, _), _ = draw()
    begins = np.random.default_rng(2).random((B, S)) < 0.3
    run = jax.vmap(lambda k, begins: offset_keys(k, begins, context(size)), axis_name=AXIS)
    got = run(shared(k[..., :4], size), shared(begins, size))
    np.testing.assert_array_equal(whole(got, size), offset_keys(jnp.asarray(k[..., :4]), jnp.asarray(begins)))


@pytest.mark.parametrize("size", [2, 3, 4])
def test_each_token_is_on_one_device_and_all_do_the_same_work(size: int):
    c = context(size)
    tokens = np.arange(S)
    own = jax.vmap(lambda _: c.own(jnp.asarray(tokens), 0), axis_name=AXIS)(jnp.arange(size))
    np.testing.assert_array_equal(own, places(size))
    found = jax.vmap(lambda _: c.positions(S // size), axis_name=AXIS)(jnp.arange(size))
    np.testing.assert_array_equal(found, own)
    work = np.sum(np.asarray(own) + 1, axis=1)  # scores that causal attention computes
    assert len(set(work.tolist())) == 1
