"""cuDNN's attention with the softmax's denominators, and a backward pass that takes them from elsewhere.

`jax.nn.dot_product_attention` rounds the former, and does not offer the latter. Both are private in JAX 0.10 to 0.12.

Shapes: q, o, g [B, T, H, C]; k, v [B, S, K, C]; lse [B, H, T].
"""

import inspect
from typing import Any

import jax
import jax.numpy as jnp


def _private() -> Any:
    from jax._src.cudnn import fused_attention_stablehlo

    return fused_attention_stablehlo


def forward(q: jax.Array, k: jax.Array, v: jax.Array, scale: float, causal: bool) -> tuple[jax.Array, jax.Array]:
    """Returns the attention in the queries' dtype, and lse in float32."""
    private = _private()
    mask = private.MaskType.CAUSAL if causal else private.MaskType.NO_MASK
    return private.dot_product_attention(q, k, v, scale=scale, mask_type=mask, return_residual=True)


def backward(
    q: jax.Array, k: jax.Array, v: jax.Array, lse: jax.Array, o: jax.Array, g: jax.Array, scale: float, causal: bool
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns the gradients of queries, keys and values, float32, of weights exp(scale q k - lse).

    Args: lse, o: of the attention to all keys, of which k and v may be some; g: the gradient of o.
    """
    private = _private()
    mask = private.MaskType.CAUSAL if causal else private.MaskType.NO_MASK
    keys = {"score_mod": None} if "score_mod" in inspect.signature(private._dot_product_attention).parameters else {}
    none = jnp.zeros(0, q.dtype)  # no bias, lengths, offsets or pages
    grads = private._dot_product_attention_bwd_p_wrapper.bind(
        q, k, v, *[none] * 7, lse, o, g, scale=scale, seed=42, dropout_rate=0.0, variadic_args=(False, False),
        mask_type=mask, layout=private.AttentionLayout.BTNH.value, sliding_window_length=None, **keys,
    )  # fmt: skip
    dq, dk, dv = (x.astype(jnp.float32) for x in grads[:3])
    return dq, dk, dv
