"""Attention of sequences that several devices share (Liu et al., Ring Attention with Blockwise Transformers, 2023).

Keys and values travel around the ring of devices. With each pair that arrives, a device computes the attention of its
queries, and merges it with what it has: values weighted by exp(score), and log of the sum of the weights. The next pair
is on its way meanwhile. In the backward pass keys and values travel once more, with their gradients.

A device's tokens are an early and a late chunk (context.py). Of a device before it on the ring, only the early chunk is
visible, to all queries; of one behind it both are, to the late queries. So each arrival is half of the scores.

Shapes as in attention.py; T queries and S keys of one device each, lse [B, K, G, T].
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxlm.model.attention import Scores
from jaxlm.model.context import Context
from jaxlm.model.remat import keep

LOWEST = float(jnp.finfo(jnp.float32).min)  # log of a sum without terms; not -inf, for the difference of two is NaN
QUERIES = 1024  # of which scores are in memory at once, at most


class Keys(NamedTuple):
    """What travels around the ring."""

    k: jax.Array  # [B, S, K, C]
    v: jax.Array  # [B, S, K, C]
    segments: jax.Array | None  # [B, S], numbers of documents

    def early(self) -> "Keys":
        return jax.tree.map(lambda x: x[:, : x.shape[1] // 2], self)


class Queries(NamedTuple):
    q: jax.Array  # [B, T, H, C]
    segments: jax.Array | None  # [B, T]
    places: jax.Array  # [T], in the sequence
    window: jax.Array | int  # tokens that a token sees, itself included


def ring_attention(
    context: Context,
    q_BTHC: jax.Array,
    k_BTKC: jax.Array,
    v_BTKC: jax.Array,
    scores: Scores,
    window: jax.Array | int,
    segments_BT: jax.Array | None = None,
) -> jax.Array:
    """Causal attention of this device's queries to the keys of all, `[B, T, H, C]`. `window` takes the place of that in
    `scores`, and may differ from layer to layer; at least the length of the sequence if a token sees all.
    """

    @jax.custom_vjp
    def attention(q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array | None, window: jax.Array) -> jax.Array:
        return forward(q, k, v, segments, window)[0]

    def forward(q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array | None, window: jax.Array) -> Any:
        queries = Queries(q, segments, context.positions(q.shape[1]), window)
        o_BTHC, lse_BKGT = _forward(context, scores, queries, Keys(k, v, segments))
        o_BTHC, lse_BKGT = keep(o_BTHC.astype(q.dtype)), keep(lse_BKGT)
        return o_BTHC, (q, k, v, segments, window, o_BTHC, lse_BKGT)

    def backward(residuals: Any, g_BTHC: jax.Array) -> tuple[Any, ...]:
        q, k, v, segments, window, o_BTHC, lse_BKGT = residuals
        queries = Queries(q, segments, context.positions(q.shape[1]), window)
        delta = jnp.sum(o_BTHC.astype(jnp.float32) * g_BTHC.astype(jnp.float32), axis=-1)
        dq, dk, dv = _backward(context, scores, queries, Keys(k, v, segments), (g_BTHC, lse_BKGT, delta))
        return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), None, None

    attention.defvjp(forward, backward)
    return attention(q_BTHC, k_BTKC, v_BTKC, segments_BT, jnp.asarray(window))


def _forward(context: Context, scores: Scores, queries: Queries, keys: Keys) -> tuple[jax.Array, jax.Array]:
    """Returns the attention `[B, T, H, C]`, float32, and the logarithms of the softmax's denominators."""
    me, T = context.index(), queries.q.shape[1]
    attend = partial(_attend, scores)

    def visit(keys: Keys, source: jax.Array) -> tuple[jax.Array, jax.Array]:
        places = context.positions(T, source)

        def before() -> tuple[jax.Array, jax.Array]:
            return attend(queries, keys.early(), places[: T // 2])

        def behind() -> tuple[jax.Array, jax.Array]:
            o, lse = attend(_late(queries), keys, places)
            return _after_zeros(o, 1), _after_zeros(lse, 3, LOWEST)

        return jax.lax.cond(source < me, before, behind)

    def arrive(carry: Any, step: jax.Array) -> tuple[Any, None]:
        keys, *found = carry
        keys = _shifted(context, keys)
        return (keys, *_merged(found, visit(keys, (me - step) % context.size))), None

    found = attend(queries, keys, queries.places)
    (_, *found), _ = jax.lax.scan(arrive, (keys, *found), jnp.arange(1, context.size))
    return found[0], found[1]


def _backward(context: Context, scores: Scores, queries: Queries, keys: Keys, of_output: Any) -> Any:
    """Returns the gradients of queries, keys and values, float32."""
    me, T = context.index(), queries.q.shape[1]
    gradients = partial(_gradients, scores)

    def visit(keys: Keys, source: jax.Array) -> Any:
        places = context.positions(T, source)

        def before() -> Any:
            dq, dk, dv = gradients(queries, keys.early(), places[: T // 2], of_output)
            return dq, _before_zeros(dk), _before_zeros(dv)

        def behind() -> Any:
            g, lse, delta = of_output
            late = g[:, T // 2 :], lse[..., T // 2 :], delta[:, T // 2 :]
            dq, dk, dv = gradients(_late(queries), keys, places, late)
            return _after_zeros(dq, 1), dk, dv

        return jax.lax.cond(source < me, before, behind)

    def arrive(carry: Any, step: jax.Array) -> tuple[Any, None]:
        keys, dq, dk, dv = carry
        keys, dk, dv = _shifted(context, (keys, dk, dv))
        more = visit(keys, (me - step) % context.size)
        return (keys, *(a + b for a, b in zip((dq, dk, dv), more, strict=True))), None

    grads = gradients(queries, keys, queries.places, of_output)
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
    wa, wb = (_by_query(w)[..., None] for w in weights)
    return o_a * wa + o_b * wb, lse


def _by_query(x_BKGT: jax.Array) -> jax.Array:
    """[B, K, G, T] -> [B, T, H]"""
    B, K, G, T = x_BKGT.shape
    return jnp.moveaxis(x_BKGT, 3, 1).reshape(B, T, K * G)


def _chunked(queries: Queries, others: Any = ()) -> tuple[int, Any]:
    """Cuts queries, and other arrays [B, T, ...], into n chunks of at most QUERIES: (n, arrays [n, B, T / n, ...])."""
    T = queries.q.shape[1]
    n = next(n for n in range(-(-T // QUERIES), T + 1) if T % n == 0)

    def cut(x: jax.Array) -> jax.Array:
        return jnp.moveaxis(x.reshape(x.shape[0], n, T // n, *x.shape[2:]), 1, 0)

    q, segments, places, _ = queries
    return n, (jax.tree.map(cut, (q, segments, others)), places.reshape(n, T // n))


def _scores(scores: Scores, queries: Queries, keys: Keys, key_places: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Scores `[B, K, G, T, S]`, float32, before the softcap; and which count, `[T, S]` or `[B, 1, 1, T, S]`."""
    B, T, H, C = queries.q.shape
    K = keys.k.shape[2]
    q_BTKGC = queries.q.reshape(B, T, K, H // K, C)
    s = jnp.einsum("btkgc,bskc->bkgts", q_BTKGC, keys.k, preferred_element_type=jnp.float32) * scores.scale
    age_TS = queries.places[:, None] - key_places
    visible = (age_TS >= 0) & (age_TS < queries.window)
    if queries.segments is not None and keys.segments is not None:
        same_BTS = queries.segments[:, :, None] == keys.segments[:, None]
        visible = visible & same_BTS[:, None, None]
    return s, visible


def _attend(scores: Scores, queries: Queries, keys: Keys, places: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Attention of all queries to these keys, `[B, T, H, C]` float32, 0 where none is visible; and lse."""

    def one(chunk: Any) -> tuple[jax.Array, jax.Array]:
        (q, segments, _), of_queries = chunk
        B, T, H, C = q.shape
        s, visible = _scores(scores, Queries(q, segments, of_queries, queries.window), keys, places)
        if scores.softcap:
            s = scores.softcap * jnp.tanh(s / scores.softcap)
        s = jnp.where(visible, s, LOWEST)
        top = s.max(axis=-1, keepdims=True)
        weights = jnp.where(visible, jnp.exp(s - top), 0)
        total = weights.sum(axis=-1)
        some = jnp.maximum(total, jnp.finfo(jnp.float32).tiny)
        v = keys.v
        o = jnp.einsum("bkgts,bskc->btkgc", weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
        o_BTHC = o.reshape(B, T, H, C) / _by_query(some)[..., None]
        return o_BTHC, jnp.where(total > 0, top[..., 0] + jnp.log(some), LOWEST)

    n, chunks = _chunked(queries)
    if n == 1:
        return one(jax.tree.map(lambda x: x[0], chunks))
    o, lse = jax.lax.map(one, chunks)
    return _rejoined(o), jnp.concatenate(list(lse), axis=-1)


def _rejoined(x: jax.Array) -> jax.Array:
    """[n, B, T / n, ...] -> [B, T, ...]"""
    return jnp.moveaxis(x, 0, 1).reshape(x.shape[1], -1, *x.shape[3:])


def _gradients(scores: Scores, queries: Queries, keys: Keys, places: jax.Array, of_output: Any) -> Any:
    """Gradients of queries, keys and values, float32, by their attention (Dao et al., FlashAttention, appendix B.2).

    Args:
      of_output: the gradient of the whole attention `[B, T, H, C]`, its lse, and the sums over C of the gradient times
        the attention, `[B, T, H]`.
    """
    g_BTHC, lse_BKGT, delta_BTH = of_output
    K = keys.k.shape[2]

    def one(total: Any, chunk: Any) -> tuple[Any, jax.Array]:
        (q, segments, (g, lse_BTH, delta)), of_queries = chunk
        B, T, H, C = q.shape
        s, visible = _scores(scores, Queries(q, segments, of_queries, queries.window), keys, places)
        slope = 1.0
        if scores.softcap:
            capped = jnp.tanh(s / scores.softcap)
            s, slope = scores.softcap * capped, 1 - jnp.square(capped)

        def by_head(x_BTH: jax.Array) -> jax.Array:
            return jnp.moveaxis(x_BTH.reshape(B, T, K, H // K), 1, 3)[..., None]

        p = jnp.where(visible, jnp.exp(jnp.where(visible, s, LOWEST) - by_head(lse_BTH)), 0)
        g_BTKGC, q_BTKGC = (x.reshape(B, T, K, H // K, C) for x in (g, q))
        dp = jnp.einsum("btkgc,bskc->bkgts", g_BTKGC, keys.v, preferred_element_type=jnp.float32)
        ds = (p * (dp - by_head(delta)) * slope * scores.scale).astype(q.dtype)
        dv = jnp.einsum("bkgts,btkgc->bskc", p.astype(g.dtype), g_BTKGC, preferred_element_type=jnp.float32)
        dk = jnp.einsum("bkgts,btkgc->bskc", ds, q_BTKGC, preferred_element_type=jnp.float32)
        dq = jnp.einsum("bkgts,bskc->btkgc", ds, keys.k, preferred_element_type=jnp.float32)
        return (total[0] + dk, total[1] + dv), dq.reshape(B, T, H, C)

    n, chunks = _chunked(queries, (g_BTHC, _by_query(lse_BKGT), delta_BTH))
    zeros = jnp.zeros(keys.k.shape, jnp.float32), jnp.zeros(keys.v.shape, jnp.float32)
    if n == 1:
        (dk, dv), dq = one(zeros, jax.tree.map(lambda x: x[0], chunks))
        return dq, dk, dv
    (dk, dv), dq = jax.lax.scan(one, zeros, chunks)
    return _rejoined(dq), dk, dv
