"""A block of ring attention (ring.py): attention of some queries to some keys, and its gradients.

The gradients need the output and the softmax's denominators of the attention to all keys. XLA computes every kind of
block; cuDNN computes those in which all keys are visible, or the earlier ones.

Shapes as in attention.py; T queries and S keys of one device each, lse [B, K, G, T].
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxlm.model import cudnn
from jaxlm.model.attention import Scores

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


class OfOutput(NamedTuple):
    """The attention to all keys, of which a block is a part."""

    g: jax.Array  # gradient of the attention, [B, T, H, C]
    o: jax.Array  # the attention, [B, T, H, C]
    lse: jax.Array  # logarithms of the softmax's denominators, [B, K, G, T]


class Blocks(NamedTuple):
    # (queries, keys, places of the keys, whether the keys are the queries' own) -> attention [B, T, H, C] float32, 0
    # where no key is visible; and lse
    attend: Callable[[Queries, Keys, jax.Array, bool], tuple[jax.Array, jax.Array]]
    # (..., of_output) -> gradients of queries, keys and values, float32
    gradients: Callable[[Queries, Keys, jax.Array, bool, OfOutput], tuple[jax.Array, jax.Array, jax.Array]]


def by_xla(scores: Scores) -> Blocks:
    """Blocks with windows, softcaps and documents. Scores of QUERIES queries at a time go through memory."""
    return Blocks(partial(_attend, scores), partial(_gradients, scores))


def by_cudnn(scores: Scores) -> Blocks:
    """Blocks by cuDNN's fused attention, without windows, softcaps and documents.

    Then a device sees its own keys causally, and those of others all or not at all. The kernel's backward pass computes
    the weights from the scores and lse, so with lse and output of the attention to all keys it needs nothing else.
    """

    def attend(queries: Queries, keys: Keys, places: jax.Array, own: bool) -> tuple[jax.Array, jax.Array]:
        o_BTHC, lse_BHT = cudnn.forward(queries.q, keys.k, keys.v, scores.scale, own)
        B, H, T = lse_BHT.shape
        K = keys.k.shape[2]
        return o_BTHC.astype(jnp.float32), lse_BHT.reshape(B, K, H // K, T)

    def gradients(queries: Queries, keys: Keys, places: jax.Array, own: bool, of_output: OfOutput) -> Any:
        g, o, lse = of_output
        lse_BHT = lse.reshape(lse.shape[0], -1, lse.shape[-1])
        return cudnn.backward(queries.q, keys.k, keys.v, lse_BHT, o, g, scores.scale, own)

    return Blocks(attend, gradients)


def by_query(x_BKGT: jax.Array) -> jax.Array:
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


def _attend(scores: Scores, queries: Queries, keys: Keys, places: jax.Array, own: bool) -> tuple[jax.Array, jax.Array]:
    """Returns the attention and lse, as Blocks.attend says. It computes QUERIES queries at a time."""

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
        o_BTHC = o.reshape(B, T, H, C) / by_query(some)[..., None]
        return o_BTHC, jnp.where(total > 0, top[..., 0] + jnp.log(some), LOWEST)

    n, chunks = _chunked(queries)
    if n == 1:
        return one(jax.tree.map(lambda x: x[0], chunks))
    o, lse = jax.lax.map(one, chunks)
    return _rejoined(o), jnp.concatenate(list(lse), axis=-1)


def _rejoined(x: jax.Array) -> jax.Array:
    """[n, B, T / n, ...] -> [B, T, ...]"""
    return jnp.moveaxis(x, 0, 1).reshape(x.shape[1], -1, *x.shape[3:])


def _gradients(scores: Scores, queries: Queries, keys: Keys, places: jax.Array, own: bool, of_output: OfOutput) -> Any:
    """Returns the gradients of queries, keys and values (Dao et al., FlashAttention, appendix B.2)."""
    g_BTHC, o_BTHC, lse_BKGT = of_output
    delta_BTH = jnp.sum(o_BTHC.astype(jnp.float32) * g_BTHC.astype(jnp.float32), axis=-1)
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

    n, chunks = _chunked(queries, (g_BTHC, by_query(lse_BKGT), delta_BTH))
    zeros = jnp.zeros(keys.k.shape, jnp.float32), jnp.zeros(keys.v.shape, jnp.float32)
    if n == 1:
        (dk, dv), dq = one(zeros, jax.tree.map(lambda x: x[0], chunks))
        return dq, dk, dv
    (dk, dv), dq = jax.lax.scan(one, zeros, chunks)
    return _rejoined(dq), dk, dv
