"""Attention of sequences that several devices share (Liu et al., Ring Attention with Blockwise Transformers, 2023).

Keys and values travel around the ring of devices. With each pair that arrives, a device computes the attention of its
queries, and merges it with what it has: values weighted by exp(score), and log of the sum of the weights. The next pair
is on its way meanwhile. In the backward pass keys and values travel once more, with their gradients.

A device's tokens are an early and a late chunk (context.py). Of a device before it on the ring, only the early chunk is
visible, to all queries; of one behind it both are, to the late queries. So each arrival is half of the scores.

Shapes as in ring_blocks.py.
"""

from typing import Any

import jax
import jax.numpy as jnp

from jaxlm.model.context import Context
from jaxlm.model.remat import keep
from jaxlm.model.ring_blocks import LOWEST, Blocks, Keys, OfOutput, Queries, by_query


def ring_attention(
    context: Context,
    q_BTHC: jax.Array,
    k_BTKC: jax.Array,
    v_BTKC: jax.Array,
    blocks: Blocks,
    window: jax.Array | int,
    segments_BT: jax.Array | None = None,
) -> jax.Array:
    """Causal attention of this device's queries to the keys of all, `[B, T, H, C]`. `window` may differ from layer to
    layer; it is at least the length of the sequence if a token sees all.
    """

    @jax.custom_vjp
    def attention(q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array | None, window: jax.Array) -> jax.Array:
        return forward(q, k, v, segments, window)[0]

    def forward(q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array | None, window: jax.Array) -> Any:
        queries = Queries(q, segments, context.positions(q.shape[1]), window)
        o_BTHC, lse_BKGT = _forward(context, blocks, queries, Keys(k, v, segments))
        o_BTHC, lse_BKGT = keep(o_BTHC.astype(q.dtype)), keep(lse_BKGT)
        return o_BTHC, (q, k, v, segments, window, o_BTHC, lse_BKGT)

    def backward(residuals: Any, g_BTHC: jax.Array) -> tuple[Any, ...]:
        q, k, v, segments, window, o_BTHC, lse_BKGT = residuals
        queries = Queries(q, segments, context.positions(q.shape[1]), window)
        dq, dk, dv = _backward(
            context, blocks, queries, Keys(k, v, segments), OfOutput(g_BTHC.astype(q.dtype), o_BTHC, lse_BKGT)
        )
        return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), None, None

    attention.defvjp(forward, backward)
    return attention(q_BTHC, k_BTKC, v_BTKC, segments_BT, jnp.asarray(window))


def _forward(context: Context, blocks: Blocks, queries: Queries, keys: Keys) -> tuple[jax.Array, jax.Array]:
    """Returns the attention `[B, T, H, C]`, float32, and the logarithms of the softmax's denominators."""
    me, T = context.index(), queries.q.shape[1]

    def visit(keys: Keys, source: jax.Array) -> tuple[jax.Array, jax.Array]:
        places = context.positions(T, source)

        def before() -> tuple[jax.Array, jax.Array]:
            return blocks.attend(queries, keys.early(), places[: T // 2], False)

        def behind() -> tuple[jax.Array, jax.Array]:
            o, lse = blocks.attend(_late(queries), keys, places, False)
            return _after_zeros(o, 1), _after_zeros(lse, 3, LOWEST)

        return jax.lax.cond(source < me, before, behind)

    def arrive(carry: Any, step: jax.Array) -> tuple[Any, None]:
        keys, *found = carry
        keys = _shifted(context, keys)
        return (keys, *_merged(found, visit(keys, (me - step) % context.size))), None

    found = blocks.attend(queries, keys, queries.places, True)
    (_, *found), _ = jax.lax.scan(arrive, (keys, *found), jnp.arange(1, context.size))
    return found[0], found[1]


def _backward(context: Context, blocks: Blocks, queries: Queries, keys: Keys, of_output: OfOutput) -> Any:
    """Returns the gradients of queries, keys and values, float32."""
    me, T = context.index(), queries.q.shape[1]

    def visit(keys: Keys, source: jax.Array) -> Any:
        places = context.positions(T, source)

        def before() -> Any:
            dq, dk, dv = blocks.gradients(queries, keys.early(), places[: T // 2], False, of_output)
            return dq, _before_zeros(dk), _before_zeros(dv)

        def behind() -> Any:
            g, o, lse = of_output
            late = OfOutput(g[:, T // 2 :], o[:, T // 2 :], lse[..., T // 2 :])
            dq, dk, dv = blocks.gradients(_late(queries), keys, places, False, late)
            return _after_zeros(dq, 1), dk, dv

        return jax.lax.cond(source < me, before, behind)

    def arrive(carry: Any, step: jax.Array) -> tuple[Any, None]:
        keys, dq, dk, dv = carry
        keys, dk, dv = _shifted(context, (keys, dk, dv))
        more = visit(keys, (me - step) % context.size)
        return (keys, *(a + b for a, b in zip((dq, dk, dv), more, strict=True))), None

    grads = blocks.gradients(queries, keys, queries.places, True, of_output)
    (_, dq, dk, dv), _ = jax.lax.scan(arrive, (keys, *grads), jnp.arange(1, context.size))
    return dq, *_shifted(context, (dk, dv))  # home


def _shifted(context: Context, tree: Any) -> Any:
    return jax.tree.map(lambda x: context.shift(x, 1), tree)


def _late(queries: Queries) -> Queries:
    half = queries.q.shape[1] // 2
    return jax.tree.map(lambda x: x[:, half:], queries._replace(places=None, window=None))._replace(
        places=queries.places[half:], window=queries.window
    )


def _after_zeros(x: jax.Array, dim: int, value: float = 0.0) -> jax.Array:
    """Doubles a dimension, whose first half becomes `value`."""
    return jnp.concatenate([jnp.full_like(x, value), x], axis=dim)


def _before_zeros(x: jax.Array) -> jax.Array:
    return jnp.concatenate([x, jnp.zeros_like(x)], axis=1)


def _merged(a: Any, b: Any) -> tuple[jax.Array, jax.Array]:
    """Attention to two sets of keys, of the attentions to each."""
    (o_a, lse_a), (o_b, lse_b) = a, b
    lse = jnp.logaddexp(lse_a, lse_b)
    weights = (jnp.exp(x - lse) for x in (lse_a, lse_b))
    wa, wb = (by_query(w)[..., None] for w in weights)
    return o_a * wa + o_b * wb, lse
