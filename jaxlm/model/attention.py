"""Attention, without parameters.

Shapes: B batch, T query time, S key time, H query heads, K key/value heads, G = H / K of them in a group, C size of a
head, R rows of any kind.
"""

import math
import warnings
from typing import Any, Literal, NamedTuple, assert_never

import jax
import jax.numpy as jnp

from jaxlm.config import ModelConfig
from jaxlm.model.context import WHOLE, Context
from jaxlm.model.remat import keep


def offset_keys(k_BSKC: jax.Array, begins_BS: jax.Array | None = None, context: Context = WHOLE) -> jax.Array:
    """Replaces half of each key's channels by those of the previous key; by zeros at the start of a row and, if rows
    hold several, where a document begins.

    A token can then find, within one layer, what came after the same token earlier in the text. Plain attention
    needs two layers: one copies the previous token to each position, the next one looks for it (Olsson et al.,
    In-context Learning and Induction Heads; Jordan et al., modded-nanogpt, "partial key offset"). The channels are
    those that RoPE rotates slowly, which carry the least information about positions.
    """
    C = k_BSKC.shape[-1]
    before_BSKC = context.previous(k_BSKC)
    if begins_BS is not None:
        before_BSKC = jnp.where(begins_BS[:, :, None, None], 0, before_BSKC)
    return jnp.where(jnp.arange(C) % (C // 2) < C // 4, k_BSKC, before_BSKC)


Kernel = Literal["xla", "cudnn", "triton"]


class Scores(NamedTuple):
    """How scores are made of queries and keys, and which count."""

    scale: float  # q @ k is multiplied by it
    softcap: float = 0.0  # cap * tanh(score / cap); 0 = off
    window: int = 0  # number of tokens that a token sees, itself included; 0 = all before it

    @staticmethod
    def of(c: ModelConfig) -> "Scores":
        return Scores(1 / math.sqrt(c.score_dim or c.head_size), c.attention_softcap, c.window)


BLOCK = 128  # the Triton kernel's sequences are multiples of this many tokens


def choose_kernel(c: ModelConfig, platform: str, packed: bool) -> Kernel:
    """Resolves `auto`: a fused kernel on GPUs in 16 bits, for head sizes up to 128 in steps of 8; else XLA.

    The fused kernel is cuDNN's, and with packed documents Triton's: cuDNN would need a mask `[B, T, T]`. Neither has
    softcaps, and Triton's has no window.
    """
    if c.attention != "auto":
        return c.attention
    if platform != "gpu" or c.dtype == "float32" or c.head_size % 8 or c.head_size > 128 or c.attention_softcap:
        return "xla"
    if packed:
        return "xla" if c.window else "triton"
    return "cudnn"


def self_attention(
    q_BTHC: jax.Array,
    k_BTKC: jax.Array,
    v_BTKC: jax.Array,
    scores: Scores,
    segments_BT: jax.Array | None = None,
    kernel: Kernel = "xla",
    causal: bool = True,
) -> jax.Array:
    """Attention to positions of the same segment, `[B, T, H, C]`; if `causal`, to the same and earlier ones. H is a
    multiple of K. Scores have a window only if `causal`.
    """
    if scores.window >= q_BTHC.shape[1]:
        scores = scores._replace(window=0)
    match kernel:
        case "xla":
            return keep(in_chunks(q_BTHC, k_BTKC, v_BTKC, scores, segments_BT, causal))
        case "cudnn":
            visible_BTS = None if segments_BT is None else segments_BT[:, :, None] == segments_BT[:, None, :]
            return cudnn(q_BTHC, k_BTKC, v_BTKC, scores, visible_BTS, causal)
        case "triton":
            return triton(q_BTHC, k_BTKC, v_BTKC, scores, segments_BT, causal)
        case other:
            assert_never(other)


def cudnn(
    q_BTHC: jax.Array,
    k_BSKC: jax.Array,
    v_BSKC: jax.Array,
    scores: Scores,
    visible_BTS: jax.Array | None,
    causal: bool = True,
) -> jax.Array:
    """cuDNN's fused attention. JAX refuses odd lengths."""
    assert not scores.softcap
    q, k, v = (_padded(x, 2) for x in (q_BTHC, k_BSKC, v_BSKC))
    if visible_BTS is None and not causal:
        visible_BTS = jnp.ones((q_BTHC.shape[0], q_BTHC.shape[1], k_BSKC.shape[1]), bool)
    mask_B1TS = None
    if visible_BTS is not None:
        mask_B1TS = _padded(_padded(visible_BTS, 2).swapaxes(1, 2), 2).swapaxes(1, 2)[:, None]
    o_BTHC = jax.nn.dot_product_attention(
        q,
        k,
        v,
        mask=mask_B1TS,
        scale=scores.scale,
        is_causal=causal,
        local_window_size=(scores.window - 1, 0) if scores.window else None,
        implementation="cudnn",
    )
    return o_BTHC[:, : q_BTHC.shape[1]]


def triton(
    q_BTHC: jax.Array,
    k_BTKC: jax.Array,
    v_BTKC: jax.Array,
    scores: Scores,
    segments_BT: jax.Array | None,
    causal: bool = True,
    interpret: bool = False,
) -> jax.Array:
    """Flash attention (Dao et al.) with the Triton kernel that comes with JAX. It compares segments block by block, so
    no mask is ever in memory.
    """
    with warnings.catch_warnings():  # jax 0.12 names a successor, whose public interface has no segments
        warnings.simplefilter("ignore", DeprecationWarning)
        from jax.experimental.pallas.ops.gpu.attention import mha

    assert not scores.softcap and not scores.window
    T, H = q_BTHC.shape[1:3]
    k_BTHC, v_BTHC = (jnp.repeat(x, H // x.shape[2], axis=2) for x in (k_BTKC, v_BTKC))
    q, k, v = (_padded(x, BLOCK) for x in (q_BTHC, k_BTHC, v_BTHC))
    if segments_BT is None and not causal:
        segments_BT = jnp.ones(q_BTHC.shape[:2], jnp.int32)
    s_BT = None if segments_BT is None else _padded(segments_BT, BLOCK)
    o_BTHC: Any = mha(q, k, v, s_BT, sm_scale=scores.scale, causal=causal, interpret=interpret)
    return o_BTHC[:, :T]


def _padded(x_BT: jax.Array, multiple: int) -> jax.Array:
    """Appends zeros to `[B, T, ...]`, to a multiple in T. Causal attention does not see them, and no segment is 0."""
    return jnp.pad(x_BT, [(0, -x_BT.shape[i] % multiple if i == 1 else 0) for i in range(x_BT.ndim)])


def in_chunks(
    q_BTHC: jax.Array,
    k_BTKC: jax.Array,
    v_BTKC: jax.Array,
    scores: Scores,
    segments_BT: jax.Array | None,
    causal: bool = True,
) -> jax.Array:
    """Attention in plain JAX. The queries are cut into chunks, and if `causal`, each chunk reads only the keys up to
    its own end, and not those before its window.

    Four chunks save three eighths of the scores, all of which would be masked. Of sequences of more than 8192 tokens, a
    chunk has about 2048.
    """
    T = q_BTHC.shape[1]
    least = 4 if causal else 1
    chunks = next(n for n in (*range(T // 2048, 4, -1), least, 2, 1) if n == 1 or (T % n == 0 and T // n >= 64))
    size = T // chunks
    outs = []
    for start in range(0, T, size):
        end = start + size if causal else T
        first = max(0, start + 1 - scores.window) if scores.window else 0
        age = (start + jnp.arange(size))[:, None] - jnp.arange(first, end)
        visible = age >= 0 if causal else jnp.ones(age.shape, bool)
        if scores.window:
            visible &= age < scores.window
        if segments_BT is not None:
            visible &= segments_BT[:, start : start + size, None] == segments_BT[:, None, first:end]
        q_BtHC = q_BTHC[:, start : start + size]
        outs.append(attend(q_BtHC, k_BTKC[:, first:end], v_BTKC[:, first:end], visible, scores))
    return jnp.concatenate(outs, axis=1)


def attend_others(
    q_BTHC: jax.Array,
    k_BSKC: jax.Array,
    v_BSKC: jax.Array,
    visible_BTS: jax.Array,
    scores: Scores,
    kernel: Kernel = "xla",
) -> jax.Array:
    """Attention to tokens of another text, `[B, T, H, C]`; in plain JAX or by cuDNN, because Triton's kernel
    cannot.
    """
    if kernel != "xla":
        return cudnn(q_BTHC, k_BSKC, v_BSKC, scores, visible_BTS, causal=False)
    chunks = [slice(start, start + 2048) for start in range(0, q_BTHC.shape[1], 2048)]
    outs = [attend(q_BTHC[:, part], k_BSKC, v_BSKC, visible_BTS[:, part], scores) for part in chunks]
    return keep(jnp.concatenate(outs, axis=1))


def attend(q_BTHC: jax.Array, k_BSKC: jax.Array, v_BSKC: jax.Array, visible: jax.Array, scores: Scores) -> jax.Array:
    """Attention with scores and softmax in float32. Each key/value head serves G = H / K query heads.

    `visible` is `[T, S]`, or `[B, T, S]` if sequences differ. Every query must see at least one key.

    The softmax's denominator divides the sum of values, not each weight (Dao et al., FlashAttention, section 3.1), so
    that its gradient is a sum over C instead of S.
    """
    B, T, H, C = q_BTHC.shape
    K = k_BSKC.shape[2]
    q_BTKGC = q_BTHC.reshape(B, T, K, H // K, C)
    s = jnp.einsum("btkgc,bskc->bkgts", q_BTKGC, k_BSKC, preferred_element_type=jnp.float32) * scores.scale
    if scores.softcap:
        s = scores.softcap * jnp.tanh(s / scores.softcap)
    s = jnp.where(visible if visible.ndim == 2 else visible[:, None, None], s, -jnp.inf)
    weights = jnp.exp(s - jax.lax.stop_gradient(s.max(axis=-1, keepdims=True)))
    o_BKGTC = jnp.einsum("bkgts,bskc->bkgtc", weights.astype(v_BSKC.dtype), v_BSKC, preferred_element_type=jnp.float32)
    o_RC = o_BKGTC.reshape(-1, C) / weights.sum(axis=-1).reshape(-1, 1)  # flat: see `layers.norm`
    return jnp.moveaxis(o_RC.reshape(o_BKGTC.shape), 3, 1).astype(v_BSKC.dtype).reshape(B, T, H, C)
