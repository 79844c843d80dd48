"""Attention of the decoder to what the encoder read (Vaswani et al., Attention Is All You Need, section 3.2.3).

A row of the encoder holds the prompts of the pairs whose answers are in the same row of the decoder, in the same order.
Each token of an answer attends to all of its own prompt. Positions play no part in it: the encoder's
states know theirs.

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
        """One prompt in each of some rows; None of None."""
        return None if prompt_S is None else Prompts(jnp.tile(jnp.asarray(prompt_S), (rows, 1)), None)


class Read(NamedTuple):
    """What the encoder made of prompts."""

    states_MD: jax.Array  # flat, M = B * S
    segments_BS: jax.Array  # numbers the prompts of a row, from 1
    begins_BS: jax.Array | None  # where a prompt begins; None = each row is one prompt


class ReadCache(NamedTuple):
    """Keys and values of what the encoder read, for decoding."""

    k: jax.Array  # [L, B, S, K, C]
    v: jax.Array  # [L, B, S, K, C]
    visible: jax.Array  # bool [L, B, S]: whether a token belongs to the prompt, the first of its row


class CrossAttention(nn.Module):
    """Attention of each answer to its prompt, with projections as in self-attention."""

    config: ModelConfig

    @nn.compact
    def __call__(
        self,
        x_ND: jax.Array,
        shape: tuple[int, int],
        segments_BT: jax.Array | None,
        read: Read | None,
        cache: ReadCache | None,
        kernel: Kernel,
        tensor: Tensor,
        drop: lora.Drop,
    ) -> tuple[jax.Array, ReadCache | None]:
        """Args:
        shape: (B, T).
        segments_BT: numbers the answers of a row, from 1; None = each row is one answer.
        read: None = the cache has it.
        cache: None in training.
        """
        c = self.config
        (B, T), H, K, C = shape, tensor.part(c.num_heads), tensor.part(c.kv_heads), c.head_size
        q_RC = linear(c, H * C, "query", bias=c.qkv_bias)(x_ND, drop).reshape(-1, C)
        if c.qk_norm:
            q_RC = rmsnorm(c, "query_norm")(keep(q_RC))
        q_BTHC = keep(q_RC).reshape(B, T, H, C)
        if read is not None:
            k_RC = linear(c, K * C, "key", bias=c.qkv_bias)(read.states_MD, drop).reshape(-1, C)
            v_BSKC = keep(linear(c, K * C, "value", bias=c.qkv_bias)(read.states_MD, drop)).reshape(B, -1, K, C)
            if c.qk_norm:
                k_RC = rmsnorm(c, "key_norm")(keep(k_RC))
            k_BSKC = keep(k_RC).reshape(v_BSKC.shape)
            if c.key_offset:
                k_BSKC = offset_keys(k_BSKC, read.begins_BS)
            visible_BTS = _of_own_prompt(segments_BT, read.segments_BS)
            cache = None if cache is None else ReadCache(k_BSKC, v_BSKC, visible_BTS[:, 0])
        else:
            assert cache is not None
            k_BSKC, v_BSKC, visible_BTS = cache.k, cache.v, cache.visible[:, None]
        visible_BTS = jnp.broadcast_to(visible_BTS, (B, T, k_BSKC.shape[1]))
        o_BTHC = attend_others(q_BTHC, k_BSKC, v_BSKC, visible_BTS, Scores.of(c), kernel)
        out = linear(c, c.d_model, "out", residual=True, join=tensor.scatter)
        return out(o_BTHC.reshape(B * T, H * C), drop), cache


def _of_own_prompt(segments_BT: jax.Array | None, read_BS: jax.Array) -> jax.Array:
    """Whether a token of an answer sees a token of a prompt, [B, T or 1, S]. Padding behind the answers sees the last
    prompt, because a softmax needs something to see; nothing depends on it.
    """
    if segments_BT is None:
        return (read_BS == 1)[:, None]
    return jnp.minimum(segments_BT, read_BS[:, -1:])[:, :, None] == read_BS[:, None, :]
