"""LayerNorm and RMSNorm of rows, with gradients that read memory as few times as possible.

A norm does little arithmetic, so it takes as long as its reading and writing. Autodiff would compute a row's statistics
again for each gradient that needs them. Here the forward pass keeps them, and the backward pass has two steps: the sums
along rows, then everything else, which XLA joins into one pass over memory.

Shapes: R rows, C columns.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jaxlm.model.remat import keep


def normalize(x_RC: jax.Array, scale_C: jax.Array, bias_C: jax.Array | None, center: bool, eps: float) -> jax.Array:
    """(x - mean) / sqrt(variance + eps) * scale + bias for each row, in the dtype of x, computed in float32.

    With `center`, this is LayerNorm (Ba et al., 2016). Without, the mean is taken as 0: RMSNorm (Zhang and Sennrich,
    2019).
    """
    forward = partial(_forward, center, eps)
    function = jax.custom_vjp(lambda x_RC, scale_C, bias_C: forward(x_RC, scale_C, bias_C)[0])
    function.defvjp(forward, partial(_backward, center))
    return function(x_RC, scale_C, bias_C)


def _forward(
    center: bool, eps: float, x_RC: jax.Array, scale_C: jax.Array, bias_C: jax.Array | None
) -> tuple[jax.Array, Any]:
    mean_R1, variance_R1 = _moments(x_RC, center)
    mean_R1, rstd_R1 = keep(mean_R1), keep(jax.lax.rsqrt(variance_R1 + eps))
    y_RC = (x_RC.astype(jnp.float32) - mean_R1) * rstd_R1 * scale_C[None]
    if bias_C is not None:
        y_RC += bias_C[None]
    return y_RC.astype(x_RC.dtype), (x_RC, mean_R1, rstd_R1, scale_C, bias_C)


def _moments(x_RC: jax.Array, center: bool) -> tuple[jax.Array, jax.Array]:
    """Mean (0 without `center`) and variance of each row, float32 `[R, 1]`.

    In 16 bits, the variance is the mean square minus the squared mean, so that both need one pass over memory. The
    float32 rounding of that difference is far below the rounding of x itself.
    """
    x = x_RC.astype(jnp.float32)
    mean_R1 = jnp.mean(x, axis=-1, keepdims=True) if center else jnp.zeros((len(x), 1))
    if center and x_RC.dtype == jnp.float32:
        return mean_R1, jnp.mean(jnp.square(x - mean_R1), axis=-1, keepdims=True)
    variance_R1 = jnp.mean(jnp.square(x), axis=-1, keepdims=True) - jnp.square(mean_R1)
    return mean_R1, jnp.maximum(variance_R1, 0)


def _backward(center: bool, residuals: Any, g_RC: jax.Array) -> tuple[jax.Array, jax.Array, Any]:
    x_RC, mean_R1, rstd_R1, scale_C, bias_C = residuals
    g = g_RC.astype(jnp.float32)
    unit_RC = (x_RC.astype(jnp.float32) - mean_R1) * rstd_R1
    scaled_RC = g * scale_C[None]
    dx_RC = scaled_RC - unit_RC * jnp.mean(scaled_RC * unit_RC, axis=-1, keepdims=True)
    if center:
        dx_RC -= jnp.mean(scaled_RC, axis=-1, keepdims=True)
    dx_RC = (dx_RC * rstd_R1).astype(x_RC.dtype)
    if bias_C is None:
        return dx_RC, jnp.sum(g * unit_RC, axis=0).astype(scale_C.dtype), None
    # As in max_and_logsumexp: CPUs sum twice, because XLA does not vectorize a reduction of pairs there.
    dscale_C, dbias_C = jax.lax.platform_dependent(g * unit_RC, g, cpu=sum_twice, default=sum_once)
    return dx_RC, dscale_C.astype(scale_C.dtype), dbias_C.astype(bias_C.dtype)


def sum_once(a_RC: jax.Array, b_RC: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Sums along columns, as one reduction: XLA for GPUs would not join two in one pass over memory."""
    zeros = jnp.float32(0), jnp.float32(0)
    return jax.lax.reduce((a_RC, b_RC), zeros, lambda x, y: (x[0] + y[0], x[1] + y[1]), (0,))


def sum_twice(a_RC: jax.Array, b_RC: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The same as `sum_once`."""
    return jnp.sum(a_RC, axis=0), jnp.sum(b_RC, axis=0)
