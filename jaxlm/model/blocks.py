"""The Transformer decoder as a Flax module.

Only this file and layers.py know Flax; neither knows device axes or training.

Shapes live in names: B batch, T query time, S key time, N = B * T flat tokens, n those of this device (tensor.py; all
if it computes alone), D d_model, F d_ff, H query heads, K key/value heads, C size of a head, V vocabulary, L layers,
R rows of any kind.

Projections, norms and MLPs work on flat tokens `[N, D]`; only attention sees `[B, T]`. On CPU this makes the gradient
of a small model a third faster than `[B, T, D]`; on GPU it is the same matrix product.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple, assert_never

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxlm.config import ModelConfig
from jaxlm.model import lora
from jaxlm.model.attention import Kernel, Scores, attend, causal_attention, choose_kernel, offset_keys
from jaxlm.model.context import WHOLE, Context
from jaxlm.model.layers import ROW_PARALLEL, Head, Mlp, dropout, linear, logits_of, norm, rmsnorm, sinusoids
from jaxlm.model.remat import REMAT, keep, layer_loop
from jaxlm.model.ring import ring_attention
from jaxlm.model.rope import Tables, local_rope_tables, rope_tables, rotate
from jaxlm.model.tensor import ALONE, Tensor, look_up

Params = Any  # nested dicts of arrays; those of the layers are stacked [L, ...]
OnLayer = Callable[[Params], Params]  # applied to one layer's parameters when the layer uses them
STATISTICS = "intermediates"  # the collection of what layers record, if it is mutable; `init` leaves it out


class Cache(NamedTuple):
    """Keys and values of the tokens seen so far, for decoding."""

    k: jax.Array  # [L, B, S, K, C]
    v: jax.Array  # [L, B, S, K, C]

    def extended(self, k_BTKC: jax.Array, v_BTKC: jax.Array, start: jax.Array) -> "Cache":
        """One layer's cache with the keys and values of T tokens added at position `start`."""
        at = (0, start, 0, 0)
        return Cache(jax.lax.dynamic_update_slice(self.k, k_BTKC, at), jax.lax.dynamic_update_slice(self.v, v_BTKC, at))


class Decoder(nn.Module):
    """Token and position embedding, L blocks, final norm, output layer.

    With `vocab_multiple`, token tables have more rows than there are tokens, for a convenient shape. The extra rows are
    never looked up and have no logits.
    """

    config: ModelConfig
    vocab_size: int
    max_len: int
    platform: str  # that it is compiled for: cpu or gpu
    on_layer: OnLayer | None = None
    tensor: Tensor = ALONE
    context: Context = WHOLE

    def setup(self) -> None:
        c = self.config
        self.rows = -(-self.vocab_size // c.vocab_multiple) * c.vocab_multiple
        self.embed = self._table(self.tensor.part(self.rows))
        if c.position == "learned":
            self.positions = self._table(self.max_len)
        self.layers = self._layers()
        self.final_norm = norm(c)
        if not c.tie_embeddings:
            self.head = Head(c, self.tensor.part(self.rows))

    def _layers(self) -> Any:
        """The blocks as one scan over stacked parameters, with remat, and with `on_layer` applied to each layer."""
        c = self.config
        block: Any = Block
        unroll, remat = layer_loop(c, self.platform)
        if self.on_layer is not None:
            on_layer = self.on_layer
            block = nn.map_variables(block, "params", trans_in_fn=lambda v: {"params": on_layer(v["params"])})
        if remat != "none":
            # In an unrolled scan, XLA would merge the recomputation with the first computation.
            block = nn.remat(block, policy=REMAT[remat], prevent_cse=unroll > 1)
        in_axes: Any = (0, 0, nn.broadcast)  # for layer, cache, shared
        layers = nn.scan(
            block,
            variable_axes={"params": 0, STATISTICS: 0},
            split_rngs={"params": True},
            in_axes=in_axes,
            unroll=unroll,
        )
        return layers(c, self.max_len)

    def _table(self, rows: int) -> nn.Embed:
        """An embedding table. Unit variance keeps embeddings visible among what the layers add to them. With tied
        embeddings, tables start with GPT-2's small variance, so that logits start near zero.
        """
        c = self.config
        init = nn.initializers.normal(0.02 if c.tie_embeddings else 1.0)
        # The cast to c.dtype follows the look-up, so that a token's gradients add up in the table's dtype: in 16 bits,
        # a sum of thousands would lose most of its terms.
        return nn.Embed(rows, c.d_model, dtype=None, param_dtype=c.param_dtype, embedding_init=init)

    def hidden(
        self,
        tokens_BT: jax.Array,
        dropout_keys_B: jax.Array | None = None,
        positions_BT: jax.Array | None = None,
        cache: Cache | None = None,
        start: jax.Array | int = 0,
    ) -> tuple[jax.Array, Cache | None]:
        """Returns the states after the final norm, `[N, D]`, and the cache with this call's keys and values added."""
        x_nD = self.begin(tokens_BT, dropout_keys_B, positions_BT, start)
        layers_L = jnp.arange(self.config.num_layers)
        x_nD, cache = self.run(x_nD, layers_L, tokens_BT.shape, dropout_keys_B, positions_BT, cache, start)
        return self.end(x_nD), cache

    def begin(
        self,
        tokens_BT: jax.Array,
        dropout_keys_B: jax.Array | None,
        positions_BT: jax.Array | None,
        start: jax.Array | int = 0,
    ) -> jax.Array:
        """What the first layer reads: embeddings, `[n, D]`."""
        c = self.config
        positions = self._positions(tokens_BT.shape[1], positions_BT, start)
        tokens_BT = self.context.own(tokens_BT, 1)
        B, T = tokens_BT.shape
        x_nD = self._embedded(tokens_BT.reshape(-1))
        if c.scale_embeddings:
            x_nD *= jnp.asarray(math.sqrt(c.d_model), c.dtype)
        if (added := self._position_embeddings(positions)) is not None:
            added_ND = jnp.broadcast_to(added.astype(c.dtype), (B, T, c.d_model)).reshape(B * T, -1)
            x_nD += self.tensor.own(added_ND)
        return dropout(x_nD, c.dropout, dropout_keys_B, 2 * c.num_layers, self.tensor, self.context)

    def run(
        self,
        x_nD: jax.Array,
        layers_l: jax.Array,
        shape: tuple[int, ...],
        dropout_keys_B: jax.Array | None,
        positions_BT: jax.Array | None,
        cache: Cache | None = None,
        start: jax.Array | int = 0,
    ) -> tuple[jax.Array, Cache | None]:
        """Applies the layers of these numbers, whose parameters are those of `layers`.

        Args: shape: of the whole sequences, (B, S).
        """
        c, context = self.config, self.context
        B, S = shape
        positions = self._positions(S, positions_BT, start)
        shared = LayerInputs(
            dropout_keys_B=dropout_keys_B,
            rope=rope_tables(positions, c) if c.position == "rope" else None,
            local_rope=local_rope_tables(positions, c) if c.window and c.rope_local_theta else None,
            segments_BT=None if positions_BT is None else context.own(jnp.cumsum(positions_BT == 0, axis=1), 1),
            begins_BT=None if positions_BT is None else positions == 0,
            start=None if cache is None else jnp.asarray(start),
            shape=(B, S // context.size),
            kernel=choose_kernel(c, self.platform, packed=positions_BT is not None),
            tensor=self.tensor,
            context=context,
        )
        return self.layers(x_nD, layers_l, cache, shared)

    def end(self, x_nD: jax.Array) -> jax.Array:
        """What the output layer reads: all rows, normed, `[N, D]`."""
        return self.tensor.gather(self.final_norm(x_nD))

    def _positions(self, S: int, positions_BT: jax.Array | None, start: jax.Array | int) -> jax.Array:
        """Of this device's tokens of sequences of S, `[T]`, or `[B, T]` if rows hold several documents."""
        if positions_BT is None:
            return start + self.context.positions(S // self.context.size)
        return self.context.own(positions_BT, 1)

    def _embedded(self, tokens_N: jax.Array) -> jax.Array:
        """The embeddings of this device's rows, `[n, D]`."""
        if self.tensor.size == 1:
            return self.embed(tokens_N).astype(self.config.dtype)
        found_ND = look_up(self.tensor, self.embed.embedding, tokens_N)
        return self.tensor.scatter(found_ND.astype(self.config.dtype))

    def _position_embeddings(self, positions: jax.Array) -> jax.Array | None:
        """Position embeddings to add to token embeddings, `[..., D]`; None for RoPE, which rotates queries and keys."""
        match self.config.position:
            case "rope":
                return None
            case "learned":
                return self.positions(positions)
            case "sinusoidal":
                return sinusoids(positions, self.config.d_model)
            case other:
                assert_never(other)

    def unembed(self, x_ND: jax.Array) -> jax.Array:
        """Returns logits `[N, V]` in float32; those of this device's tokens, with extra rows, if there are several."""
        c = self.config
        logits_NV = logits_of(x_ND, self.embed.embedding.T) if c.tie_embeddings else self.head(x_ND)
        if self.tensor.size == 1:
            logits_NV = logits_NV[:, : self.vocab_size]
        if c.logit_softcap:
            logits_NV = c.logit_softcap * jnp.tanh(logits_NV / c.logit_softcap)
        return logits_NV

    def __call__(self, tokens_BT: jax.Array) -> jax.Array:
        x_ND, _ = self.hidden(tokens_BT)
        return self.unembed(x_ND).reshape(*tokens_BT.shape, -1)


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
    shape: tuple[int, int] = field(metadata={"static": True})  # (B, T)
    kernel: Kernel = field(metadata={"static": True})  # that computes attention without a cache
    tensor: Tensor = field(metadata={"static": True})
    context: Context = field(metadata={"static": True})


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)), with the signature of a scan's body.

    With `post_norms`, norms follow attention and MLP, too (Gemma 2, section 2).
    """

    config: ModelConfig
    context: int  # number of tokens that a decoded token sees at most, itself included

    @nn.compact
    def __call__(self, x_nD: jax.Array, layer: jax.Array, cache: Cache | None, shared: LayerInputs) -> Any:
        c, tensor = self.config, shared.tensor
        normed_ND = tensor.gather(norm(c, "attention_norm")(x_nD))
        drop = lora_dropout(c, layer, shared)
        a_nD, cache = Attention(c, self.context, name="attention")(normed_ND, layer, cache, shared, drop)
        if c.post_norms:
            a_nD = norm(c, "attention_post_norm")(a_nD)
        x_nD += dropout(a_nD, c.dropout, shared.dropout_keys_B, 2 * layer, tensor, shared.context)
        x_nD = keep(x_nD)
        m_nD = Mlp(c, tensor, name="mlp")(tensor.gather(norm(c, "mlp_norm")(x_nD)), drop)
        if c.post_norms:
            m_nD = norm(c, "mlp_post_norm")(m_nD)
        x_nD += dropout(m_nD, c.dropout, shared.dropout_keys_B, 2 * layer + 1, tensor, shared.context)
        if self.is_mutable_collection(STATISTICS):
            float_nD = jax.lax.stop_gradient(x_nD).astype(jnp.float32)
            squares_D = jnp.sum(jnp.square(float_nD), axis=0)  # in two steps, for the rounding of a sum grows with it
            self.sow(STATISTICS, "squares", jnp.sum(squares_D))
        return x_nD, cache


def lora_dropout(c: ModelConfig, layer: jax.Array, shared: LayerInputs) -> lora.Drop:
    """The dropout of what LoRA reads in a block. Its sites follow those of the model's own dropout."""

    def drop(x_ND: jax.Array, name: str) -> jax.Array:
        site = 2 * c.num_layers + 1 + len(lora.PLACES) * layer + lora.PLACES[name]
        columns = shared.tensor if name in ROW_PARALLEL else ALONE  # of which this device has some
        return dropout(x_ND, c.lora_dropout, shared.dropout_keys_B, site, columns, shared.context, dim=1)

    return drop


class Attention(nn.Module):
    """Causal multi-head self-attention. With fewer key/value heads, each serves a group of query heads.

    Several devices compute some of the heads each, from all rows `[N, D]` to some, `[n, D]`; if there are fewer
    key/value heads than devices, neighbours compute the same one.
    """

    config: ModelConfig
    context: int

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
            o_BTHC = attend_layer(c, is_global, q_BTHC, k_BTKC, v_BTKC, shared)
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
) -> jax.Array:
    """Attention in a layer with a window or without; where layers differ, a branch of each."""
    context = shared.context
    if context.size > 1:
        S = q_BTHC.shape[1] * context.size
        window = jnp.where(is_global, S, c.window or S)
        return ring_attention(context, q_BTHC, k_BTKC, v_BTKC, Scores.of(c), window, shared.segments_BT)

    def branch(window: int) -> Callable[..., jax.Array]:
        scores = Scores.of(c)._replace(window=window)
        return lambda q, k, v: causal_attention(q, k, v, scores, shared.segments_BT, shared.kernel)

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
