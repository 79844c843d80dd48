"""A block of the Transformer, attention and MLP, as Flax modules.

Shapes live in names: B batch, T query time, S key time, N = B * T flat tokens, n those of this device (tensor.py; all
if it computes alone), D d_model, F d_ff, H query heads, K key/value heads, C size of a head, V vocabulary, L layers,
R rows of any kind.

Projections, norms and MLPs work on flat tokens `[N, D]`; only attention sees `[B, T]`. On CPU this makes the gradient
of a small model a third faster than `[B, T, D]`; on GPU it is the same matrix product.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxlm.config import ModelConfig
from jaxlm.model import lora, ring_blocks
from jaxlm.model.attention import Kernel, Scores, attend, offset_keys, self_attention
from jaxlm.model.context import Context
from jaxlm.model.cross_attention import CrossAttention, Encoded, EncodedCache
from jaxlm.model.layers import ROW_PARALLEL, Mlp, dropout, linear, norm, rmsnorm
from jaxlm.model.remat import keep
from jaxlm.model.ring import ring_attention
from jaxlm.model.rope import Tables, rotate
from jaxlm.model.tensor import ALONE, Tensor

CROSS = 10**6  # the first site of dropout (layers.dropout) behind attention to the encoder; others are below
STATISTICS = "intermediates"  # the collection of what layers record, if it is mutable; `init` leaves it out


class Cache(NamedTuple):
    """Keys and values of the tokens seen so far, for decoding."""

    k: jax.Array  # [L, B, S, K, C]
    v: jax.Array  # [L, B, S, K, C]
    encoded: EncodedCache | None = None  # of the encoder's states; None without an encoder

    def extended(self, k_BTKC: jax.Array, v_BTKC: jax.Array, start: jax.Array) -> "Cache":
        """One layer's cache with the keys and values of T tokens added at position `start`."""
        at = (0, start, 0, 0)
        k, v = (jax.lax.dynamic_update_slice(*both, at) for both in ((self.k, k_BTKC), (self.v, v_BTKC)))
        return self._replace(k=k, v=v)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LayerInputs:
    """Inputs that all layers share."""

    dropout_keys_B: jax.Array | None
    rope: Tables | None
    local_rope: Tables | None  # of layers with a window; None = as in the others
    segments_BT: jax.Array | None  # numbers the documents of a row; None = one document
    begins_BT: jax.Array | None  # where a document begins; None = one document
    start: jax.Array | None  # position of this call's first token, where it enters the cache; None without a cache
    encoded: Encoded | None  # what the encoder made of the prompts; None without an encoder, and if the cache has it
    shape: tuple[int, int] = field(metadata={"static": True})  # (B, T)
    kernel: Kernel = field(metadata={"static": True})  # that computes attention without a cache
    tensor: Tensor = field(metadata={"static": True})
    context: Context = field(metadata={"static": True})


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)), with the signature of a scan's body.

    With `post_norms`, norms follow attention and MLP, too (Gemma 2, section 2). If there is an encoder, a decoder's
    block attends to the encoder's states between the two.
    """

    config: ModelConfig
    context: int  # number of tokens that a decoded token sees at most, itself included
    causal: bool = True  # whether tokens see only the ones before them; not in an encoder

    @nn.compact
    def __call__(self, x_nD: jax.Array, layer: jax.Array, cache: Cache | None, shared: LayerInputs) -> Any:
        c, tensor = self.config, shared.tensor
        normed_ND = tensor.gather(norm(c, "attention_norm")(x_nD))
        drop = lora_dropout(c, layer, shared)
        attention = Attention(c, self.context, self.causal, name="attention")
        a_nD, cache = attention(normed_ND, layer, cache, shared, drop)
        if c.post_norms:
            a_nD = norm(c, "attention_post_norm")(a_nD)
        x_nD += dropout(a_nD, c.dropout, shared.dropout_keys_B, 2 * layer, tensor, shared.context)
        x_nD = keep(x_nD)
        if c.encoder_layers:  # none in the configuration of the encoder's own blocks
            x_nD, cache = self._cross(x_nD, layer, cache, shared)
        m_nD = Mlp(c, tensor, name="mlp")(tensor.gather(norm(c, "mlp_norm")(x_nD)), drop)
        if c.post_norms:
            m_nD = norm(c, "mlp_post_norm")(m_nD)
        x_nD += dropout(m_nD, c.dropout, shared.dropout_keys_B, 2 * layer + 1, tensor, shared.context)
        if self.is_mutable_collection(STATISTICS):
            float_nD = jax.lax.stop_gradient(x_nD).astype(jnp.float32)
            squares_D = jnp.sum(jnp.square(float_nD), axis=0)  # in two steps, for the rounding of a sum grows with it
            self.sow(STATISTICS, "squares", jnp.sum(squares_D))
        return x_nD, cache

    def _cross(self, x_nD: jax.Array, layer: jax.Array, cache: Cache | None, shared: LayerInputs) -> Any:
        """x + attention of norm(x) to the encoder's states."""
        c, tensor = self.config, shared.tensor
        normed_ND = tensor.gather(norm(c, "cross_norm")(x_nD))
        drop = lora_dropout(c, layer, shared, 2 * CROSS)
        before, segments_BT = None if cache is None else cache.encoded, shared.segments_BT
        attend = CrossAttention(c, name="cross")
        a_nD, after = attend(normed_ND, shared.shape, segments_BT, shared.encoded, before, shared.kernel, tensor, drop)
        if c.post_norms:
            a_nD = norm(c, "cross_post_norm")(a_nD)
        x_nD += dropout(a_nD, c.dropout, shared.dropout_keys_B, CROSS + layer, tensor)
        return keep(x_nD), None if cache is None else cache._replace(encoded=after)


def lora_dropout(c: ModelConfig, layer: jax.Array, shared: LayerInputs, first: int = 0) -> lora.Drop:
    """The dropout of what LoRA reads in a block. Its sites follow those of the model's own dropout, plus `first`."""

    def drop(x_ND: jax.Array, name: str) -> jax.Array:
        site = first + 2 * c.num_layers + 1 + len(lora.PLACES) * layer + lora.PLACES[name]
        columns = shared.tensor if name in ROW_PARALLEL else ALONE  # of which this device has some
        return dropout(x_ND, c.lora_dropout, shared.dropout_keys_B, site, columns, shared.context, dim=1)

    return drop


class Attention(nn.Module):
    """Multi-head self-attention. With fewer key/value heads, each serves a group of query heads.

    Several devices compute some of the heads each, from all rows `[N, D]` to some, `[n, D]`; if there are fewer
    key/value heads than devices, neighbours compute the same one.
    """

    config: ModelConfig
    context: int
    causal: bool

    @nn.compact
    def __call__(
        self, x_ND: jax.Array, layer: jax.Array, cache: Cache | None, shared: LayerInputs, drop: lora.Drop
    ) -> tuple[jax.Array, Cache | None]:
        c, tensor = self.config, shared.tensor
        B, T = shared.shape
        H, K, C = tensor.part(c.num_heads), tensor.part(c.kv_heads), c.head_size
        q_RC = linear(c, H * C, "query", bias=c.qkv_bias)(x_ND, drop).reshape(-1, C)
        k_RC = linear(c, K * C, "key", bias=c.qkv_bias)(x_ND, drop).reshape(-1, C)
        v_BTKC = keep(linear(c, K * C, "value", bias=c.qkv_bias)(x_ND, drop)).reshape(B, T, K, C)
        if c.qk_norm:
            q_RC, k_RC = keep(q_RC), keep(k_RC)  # the norm's gradient reads them
            q_RC, k_RC = rmsnorm(c, "query_norm")(q_RC), rmsnorm(c, "key_norm")(k_RC)
        q_BTHC, k_BTKC = q_RC.reshape(B, T, H, C), k_RC.reshape(B, T, K, C)
        is_global = attends_to_all(c, layer)
        if shared.rope is not None:
            rope = shared.rope
            if shared.local_rope is not None:
                rope = jax.tree.map(lambda *tables: jnp.where(is_global, *tables), rope, shared.local_rope)
            q_BTHC, k_BTKC = rotate(q_BTHC, rope), rotate(k_BTKC, rope)
        if not c.qk_norm:
            q_BTHC, k_BTKC = keep(q_BTHC), keep(k_BTKC)  # RoPE's gradient does not read its arguments
        if cache is None:
            if c.key_offset:
                k_BTKC = offset_keys(k_BTKC, shared.begins_BT, shared.context)
            o_BTHC = attend_layer(c, is_global, q_BTHC, k_BTKC, v_BTKC, shared, self.causal)
        else:
            assert shared.start is not None
            cache = cache.extended(k_BTKC, v_BTKC, shared.start)
            window = jnp.where(is_global, self.context, min(c.window or self.context, self.context))
            o_BTHC = attend_cache(c, q_BTHC, cache, shared.start, window)
        out = linear(c, c.d_model, "out", residual=True, join=tensor.scatter)
        return out(o_BTHC.reshape(B * T, H * C), drop), cache


def attends_to_all(c: ModelConfig, layer: jax.Array) -> jax.Array | bool:
    """Whether a layer has no window."""
    if c.window and c.global_every:
        return (layer + 1) % c.global_every == 0
    return not c.window


def attend_layer(
    c: ModelConfig,
    is_global: jax.Array | bool,
    q_BTHC: jax.Array,
    k_BTKC: jax.Array,
    v_BTKC: jax.Array,
    shared: LayerInputs,
    causal: bool,
) -> jax.Array:
    """Attention in a layer with a window or without; where layers differ, a branch of each."""
    context = shared.context
    if context.size > 1:
        S = q_BTHC.shape[1] * context.size
        window = jnp.where(is_global, S, c.window or S)
        is_fused = shared.kernel == "cudnn" and not c.window
        blocks = (ring_blocks.by_cudnn if is_fused else ring_blocks.by_xla)(Scores.of(c))
        return ring_attention(context, q_BTHC, k_BTKC, v_BTKC, blocks, window, shared.segments_BT)

    def branch(window: int) -> Callable[..., jax.Array]:
        scores = Scores.of(c)._replace(window=window)
        return lambda q, k, v: self_attention(q, k, v, scores, shared.segments_BT, shared.kernel, causal)

    differ = c.window and c.global_every and c.window < q_BTHC.shape[1]
    if not differ:
        return branch(c.window)(q_BTHC, k_BTKC, v_BTKC)
    return jax.lax.cond(is_global, branch(0), branch(c.window), q_BTHC, k_BTKC, v_BTKC)


def attend_cache(c: ModelConfig, q_BTHC: jax.Array, cache: Cache, start: jax.Array, window: jax.Array) -> jax.Array:
    """Attention of tokens at positions start, start + 1, ... to one layer's cache. Each sees the last `window` tokens,
    itself included, as in training.
    """
    age_TS = (start + jnp.arange(q_BTHC.shape[1]))[:, None] - jnp.arange(cache.k.shape[1])
    visible_TS = (age_TS >= 0) & (age_TS < window)
    keys_BSKC = offset_keys(cache.k) if c.key_offset else cache.k
    return attend(q_BTHC, keys_BSKC, cache.v, visible_TS, Scores.of(c))
