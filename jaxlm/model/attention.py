"""Attention and rotary positions, without parameters.

Shapes: B batch, T query time, S key time, H query heads, K key/value heads, G = H / K of them in a group, C size of a
head, R rows of any kind.
"""

import math
from typing import Literal

import jax
import jax.numpy as jnp


def rope_tables(positions: jax.Array, head_size: int, theta: float) -> tuple[jax.Array, jax.Array]:
    """Cosines and signed sines for `rotate`, `[..., 1, C]` in float32."""
    angles = positions[..., None, None] * theta ** (-jnp.arange(0, head_size, 2) / head_size)
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    return jnp.concatenate([cos, cos], axis=-1), jnp.concatenate([-sin, sin], axis=-1)


def rotate(x_BTHC: jax.Array, rope: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotates pairs of channels (Su et al., RoFormer). Pairs are (i, i + C / 2), as in Llama's Hugging Face weights.

    The halves are swapped by a roll: on CPU, concatenating them would take a tenth of a small model's step.
    """
    cos, sin = rope
    x = x_BTHC.astype(jnp.float32)
    return (x * cos + jnp.roll(x, x.shape[-1] // 2, axis=-1) * sin).astype(x_BTHC.dtype)


def offset_keys(k_BSKC: jax.Array, segments_BS: jax.Array | None = None) -> jax.Array:
    """Replaces half of each key's channels by those of the previous key; by zeros at the start of a row and, with
    segments, of each document.

    A token can then find, within one layer, what came after the same token earlier in the text. Plain attention
    needs two layers: one copies the previous token to each position, the next one looks for it (Olsson et al.,
    In-context Learning and Induction Heads; Jordan et al., modded-nanogpt, "partial key offset"). The channels are
    those that RoPE rotates slowly, which carry the least information about positions.
    """
    C = k_BSKC.shape[-1]
    before_BSKC = jnp.pad(k_BSKC, ((0, 0), (1, 0), (0, 0), (0, 0)))[:, :-1]
    if segments_BS is not None:
        begins_BS = jnp.diff(segments_BS, axis=1, prepend=-1) != 0
        before_BSKC = jnp.where(begins_BS[:, :, None, None], 0, before_BSKC)
    return jnp.where(jnp.arange(C) % (C // 2) < C // 4, k_BSKC, before_BSKC)


Kernel = Literal["xla", "cudnn"]


def choose_kernel(wanted: Literal["auto", "xla", "cudnn"], dtype: str, head_size: int) -> Kernel:
    """Resolves `auto`: cuDNN's fused attention on GPUs in 16 bits, for head sizes up to 128 in steps of 8; else XLA."""
    if wanted != "auto":
        return wanted
    fused = jax.default_backend() == "gpu" and dtype != "float32" and head_size % 8 == 0 and head_size <= 128
    return "cudnn" if fused else "xla"


def causal_attention(
    q_BTHC: jax.Array,
    k_BTKC: jax.Array,
    v_BTKC: jax.Array,
    segments_BT: jax.Array | None = None,
    kernel: Kernel = "xla",
) -> jax.Array:
    """Attention to the same and earlier positions of the same segment, `[B, T, H, C]`. H is a multiple of K.

    With `xla`, the queries are cut into up to four chunks, and each chunk reads only the keys up to its own end. Four
    chunks save three eighths of the scores, all of which would be masked.
    """
    if kernel == "cudnn":
        s_BT = segments_BT
        mask_B1TS = None if s_BT is None else (s_BT[:, :, None] == s_BT[:, None, :])[:, None]
        return jax.nn.dot_product_attention(
            q_BTHC, k_BTKC, v_BTKC, mask=mask_B1TS, is_causal=True, implementation="cudnn"
        )
    T = q_BTHC.shape[1]
    chunks = next(n for n in (4, 2, 1) if n == 1 or (T % n == 0 and T // n >= 64))
    size = T // chunks
    outs = []
    for start in range(0, T, size):
        end = start + size
        visible = (start + jnp.arange(size))[:, None] >= jnp.arange(end)
        if segments_BT is not None:
            visible &= segments_BT[:, start:end, None] == segments_BT[:, None, :end]
        outs.append(attend(q_BTHC[:, start:end], k_BTKC[:, :end], v_BTKC[:, :end], visible))
    return jnp.concatenate(outs, axis=1)


def attend(q_BTHC: jax.Array, k_BSKC: jax.Array, v_BSKC: jax.Array, visible: jax.Array) -> jax.Array:
    """Attention with scores and softmax in float32. Each key/value head serves G = H / K query heads.

    `visible` is `[T, S]`, or `[B, T, S]` if sequences differ. Every query must see at least one key.

    The softmax's denominator divides the sum of values, not each weight (Dao et al., FlashAttention, section 3.1), so
    that its gradient is a sum over C instead of S.
    """
    B, T, H, C = q_BTHC.shape
    K = k_BSKC.shape[2]
    q_BTKGC = q_BTHC.reshape(B, T, K, H // K, C)
    scores = jnp.einsum("btkgc,bskc->bkgts", q_BTKGC, k_BSKC, preferred_element_type=jnp.float32) / math.sqrt(C)
    scores = jnp.where(visible if visible.ndim == 2 else visible[:, None, None], scores, -jnp.inf)
    weights = jnp.exp(scores - jax.lax.stop_gradient(scores.max(axis=-1, keepdims=True)))
    o_BKGTC = jnp.einsum("bkgts,bskc->bkgtc", weights.astype(v_BSKC.dtype), v_BSKC, preferred_element_type=jnp.float32)
    o_RC = o_BKGTC.reshape(-1, C) / weights.sum(axis=-1).reshape(-1, 1)  # flat: see `layers.norm`
    return jnp.moveaxis(o_RC.reshape(o_BKGTC.shape), 3, 1).astype(v_BSKC.dtype).reshape(B, T, H, C)
