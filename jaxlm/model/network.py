"""The Transformer as a Flax module: tables, layers, final norm, output layer, and an encoder if there is one.

Only this file, blocks.py, cross_attention.py and layers.py know Flax; none of them knows device axes or training. Shape
names as in blocks.py.
"""

import math
from collections.abc import Callable
from typing import Any, assert_never

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxlm.config import ModelConfig
from jaxlm.model.attention import choose_kernel
from jaxlm.model.blocks import STATISTICS, Block, Cache, LayerInputs
from jaxlm.model.context import WHOLE, Context
from jaxlm.model.cross_attention import Encoded, Prompts
from jaxlm.model.layers import Head, dropout, logits_of, norm, sinusoids
from jaxlm.model.remat import REMAT, layer_loop
from jaxlm.model.rope import local_rope_tables, rope_tables
from jaxlm.model.tensor import ALONE, Tensor, look_up

Params = Any  # nested dicts of arrays; those of the layers are stacked [L, ...] (STACKS)
OnLayer = Callable[[Params, str], Params]  # (one layer's parameters, their stack), applied when the layer uses them
ENCODER = 10**9  # folded into keys of dropout, so that the encoder draws other masks than the decoder


class Transformer(nn.Module):
    """Token and position embedding, L blocks, final norm, output layer.

    An encoder has layers, norm and positions of its own, and the same token embedding.

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
        self.layers = self._layers(c, "layers")
        self.final_norm = norm(c)
        if c.encoder_layers:
            if c.position == "learned":
                self.encoder_positions = self._table(c.encoder_len)
            self.encoder = self._layers(c.encoder, "encoder", causal=False)
            self.encoder_norm = norm(c)
        if not c.tie_embeddings:
            self.head = Head(c, self.tensor.part(self.rows))

    def _layers(self, c: ModelConfig, stack: str, causal: bool = True) -> Any:
        """The blocks as one scan over stacked parameters, with remat, and with `on_layer` applied to each layer."""
        block: Any = Block
        unroll, remat = layer_loop(c, self.platform)
        if self.on_layer is not None:
            on_layer = self.on_layer
            block = nn.map_variables(block, "params", trans_in_fn=lambda v: {"params": on_layer(v["params"], stack)})
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
        return layers(c, self.max_len, causal)

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
        prompts: Prompts | None = None,
    ) -> tuple[jax.Array, Cache | None]:
        """Returns the states after the final norm, `[N, D]`, and the cache with this call's keys and values added."""
        encoded = None if prompts is None else self.encode(prompts, dropout_keys_B)
        x_nD = self.begin(tokens_BT, dropout_keys_B, positions_BT, start)
        layers_L = jnp.arange(self.config.num_layers)
        x_nD, cache = self.run(x_nD, layers_L, tokens_BT.shape, dropout_keys_B, positions_BT, cache, start, encoded)
        return self.end(x_nD), cache

    def encode(self, prompts: Prompts, dropout_keys_B: jax.Array | None) -> Encoded:
        """What the encoder makes of prompts."""
        c, (tokens_BS, positions_BS) = self.config.encoder, prompts
        if dropout_keys_B is not None:
            dropout_keys_B = jax.vmap(jax.random.fold_in, (0, None))(dropout_keys_B, ENCODER)
        positions = self._positions(tokens_BS.shape[1], positions_BS, 0)
        table = self.encoder_positions if c.position == "learned" else None
        x_nD = self._embedded(tokens_BS, positions, table)
        x_nD = dropout(x_nD, c.dropout, dropout_keys_B, 2 * c.num_layers, self.tensor)
        shared = self._shared(tokens_BS.shape, dropout_keys_B, positions_BS)
        x_nD, _ = self.encoder(x_nD, jnp.arange(c.num_layers), None, shared)
        segments_BS = jnp.ones_like(tokens_BS) if shared.segments_BT is None else shared.segments_BT
        return Encoded(self.tensor.gather(self.encoder_norm(x_nD)), segments_BS, shared.begins_BT)

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
        table = self.positions if c.position == "learned" else None
        x_nD = self._embedded(self.context.own(tokens_BT, 1), positions, table)
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
        encoded: Encoded | None = None,
    ) -> tuple[jax.Array, Cache | None]:
        """Applies the layers numbered `layers_l`.

        Args: shape: of the whole sequences, (B, S).
        """
        first = None if cache is None else jnp.asarray(start)
        shared = self._shared(shape, dropout_keys_B, positions_BT, first, encoded)
        return self.layers(x_nD, layers_l, cache, shared)

    def _shared(
        self,
        shape: tuple[int, ...],
        dropout_keys_B: jax.Array | None,
        positions_BT: jax.Array | None,
        start: jax.Array | None = None,
        encoded: Encoded | None = None,
    ) -> LayerInputs:
        c, context = self.config, self.context
        B, S = shape
        positions = self._positions(S, positions_BT, 0 if start is None else start)
        return LayerInputs(
            dropout_keys_B=dropout_keys_B,
            rope=rope_tables(positions, c) if c.position == "rope" else None,
            local_rope=local_rope_tables(positions, c) if c.window and c.rope_local_theta else None,
            segments_BT=None if positions_BT is None else context.own(jnp.cumsum(positions_BT == 0, axis=1), 1),
            begins_BT=None if positions_BT is None else positions == 0,
            start=start,
            encoded=encoded,
            shape=(B, S // context.size),
            kernel=choose_kernel(c, self.platform, packed=positions_BT is not None),
            tensor=self.tensor,
            context=context,
        )

    def end(self, x_nD: jax.Array) -> jax.Array:
        """What the output layer reads: all rows, normed, `[N, D]`."""
        return self.tensor.gather(self.final_norm(x_nD))

    def _positions(self, S: int, positions_BT: jax.Array | None, start: jax.Array | int) -> jax.Array:
        """Of this device's tokens of sequences of S, `[T]`, or `[B, T]` if rows hold several documents."""
        if positions_BT is None:
            return start + self.context.positions(S // self.context.size)
        return self.context.own(positions_BT, 1)

    def _embedded(self, tokens_BT: jax.Array, positions: jax.Array, table: Any) -> jax.Array:
        """The embeddings of this device's rows, with those of positions, `[n, D]`."""
        c = self.config
        x_nD = self._looked_up(tokens_BT.reshape(-1))
        if c.scale_embeddings:
            x_nD *= jnp.asarray(math.sqrt(c.d_model), c.dtype)
        if (added := self._position_embeddings(positions, table)) is not None:
            B, T = tokens_BT.shape
            added_ND = jnp.broadcast_to(added.astype(c.dtype), (B, T, c.d_model)).reshape(B * T, -1)
            x_nD += self.tensor.own(added_ND)
        return x_nD

    def _looked_up(self, tokens_N: jax.Array) -> jax.Array:
        """The token embeddings of this device's rows, `[n, D]`."""
        if self.tensor.size == 1:
            return self.embed(tokens_N).astype(self.config.dtype)
        found_ND = look_up(self.tensor, self.embed.embedding, tokens_N)
        return self.tensor.scatter(found_ND.astype(self.config.dtype))

    def _position_embeddings(self, positions: jax.Array, table: Any) -> jax.Array | None:
        """Position embeddings to add to token embeddings, `[..., D]`; None for RoPE, which rotates queries and keys."""
        match self.config.position:
            case "rope":
                return None
            case "learned":
                return table(positions)
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
        """For `init` alone."""
        x_ND, _ = self.hidden(tokens_BT, prompts=Prompts(tokens_BT, None) if self.config.encoder_layers else None)
        return self.unembed(x_ND).reshape(*tokens_BT.shape, -1)
