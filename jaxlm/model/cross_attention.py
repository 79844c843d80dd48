"""Attention of the decoder to the encoder's states (Vaswani et al., Attention Is All You Need, section 3.2.3).

A row of the encoder holds the prompts of the pairs whose answers are in the same row of the decoder, in the same order.
Each token of an answer attends to all of its own prompt. Positions play no part in it: the encoder's states know
theirs.

Shapes: S time of the encoder; otherwise those of blocks.py.
"""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.config import ModelConfig
from jaxlm.model import lora
from jaxlm.model.attention import Kernel, Scores, attend_others, offset_keys
from jaxlm.model.layers import linear, rmsnorm
from jaxlm.model.remat import keep
from jaxlm.model.tensor import Tensor


class Prompts(NamedTuple):
    """What the encoder reads."""

    tokens_BS: jax.Array
    positions_BS: jax.Array | None  # of a token in its prompt; None = each row is one prompt

    @staticmethod
    def repeated(prompt_S: np.ndarray | None, rows: int) -> "Prompts | None":
        """Repeats a prompt in `rows` rows; returns None if there is no prompt."""
        return None if prompt_S is None else Prompts(jnp.tile(jnp.asarray(prompt_S), (rows, 1)), None)


class Encoded(NamedTuple):
    """What the encoder made of prompts."""

    states_MD: jax.Array  # flat, M = B * S
    segments_BS: jax.Array  # numbers the prompts of a row, from 1; each padding token has a number of its own
    begins_BS: jax.Array | None  # where a prompt begins; None = each row is one prompt


class EncodedCache(NamedTuple):
    """Keys and values of the encoder's states, for decoding."""

    k: jax.Array  # [L, B, S, K, C]
    v: jax.Array  # [L, B, S, K, C]
    visible: jax.Array  # bool [L, B, S]: whether a place holds the prompt, not padding


class CrossAttention(nn.Module):
    """Attention of each answer to its prompt, with projections as in self-attention."""

    config: ModelConfig

    @nn.compact
    def __call__(
        self,
        x_ND: jax.Array,
        shape: tuple[int, int],
        segments_BT: jax.Array | None,
        encoded: Encoded | None,
        cache: EncodedCache | None,
        kernel: Kernel,
        tensor: Tensor,
        drop: lora.Drop,
    ) -> tuple[jax.Array, EncodedCache | None]:
        """Args:
        shape: (B, T).
        segments_BT: numbers the answers of a row, from 1; None = each row is one answer.
        encoded: None = the cache has its keys and values.
        cache: None in training.
        """
        c = self.config
        (B, T), H, K, C = shape, tensor.part(c.num_heads), tensor.part(c.kv_heads), c.head_size
        q_RC = linear(c, H * C, "query", bias=c.qkv_bias)(x_ND, drop).reshape(-1, C)
        if c.qk_norm:
            q_RC = rmsnorm(c, "query_norm")(keep(q_RC))
        q_BTHC = keep(q_RC).reshape(B, T, H, C)
        if encoded is not None:
            k_RC = linear(c, K * C, "key", bias=c.qkv_bias)(encoded.states_MD, drop).reshape(-1, C)
            v_BSKC = keep(linear(c, K * C, "value", bias=c.qkv_bias)(encoded.states_MD, drop)).reshape(B, -1, K, C)
            if c.qk_norm:
                k_RC = rmsnorm(c, "key_norm")(keep(k_RC))
            k_BSKC = keep(k_RC).reshape(v_BSKC.shape)
            if c.key_offset:
                k_BSKC = offset_keys(k_BSKC, encoded.begins_BS)
            visible_BTS = _of_own_prompt(segments_BT, encoded.segments_BS)
            cache = None if cache is None else EncodedCache(k_BSKC, v_BSKC, visible_BTS[:, 0])
        else:
            assert cache is not None
            k_BSKC, v_BSKC, visible_BTS = cache.k, cache.v, cache.visible[:, None]
        visible_BTS = jnp.broadcast_to(visible_BTS, (B, T, k_BSKC.shape[1]))
        o_BTHC = attend_others(q_BTHC, k_BSKC, v_BSKC, visible_BTS, Scores.of(c), kernel)
        out = linear(c, c.d_model, "out", residual=True, join=tensor.scatter)
        return out(o_BTHC.reshape(B * T, H * C), drop), cache


def _of_own_prompt(segments_BT: jax.Array | None, segments_BS: jax.Array) -> jax.Array:
    """Whether a token of an answer sees a token of a prompt, [B, T or 1, S]. Padding behind the answers sees padding
    behind the prompts or, if there is less of that, the last token: a softmax needs something to see. Nothing depends
    on it.
    """
    if segments_BT is None:
        return (segments_BS == 1)[:, None]
    return jnp.minimum(segments_BT, segments_BS[:, -1:])[:, :, None] == segments_BS[:, None, :]
