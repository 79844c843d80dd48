"""Gradients in float16, which holds numbers from 6e-8 to 65504.

In the gradient of a mean, each token's part shrinks with their number, and most parts of a large batch round to zero.
So the sum over tokens is differentiated instead, times a scale; float32 gradients of parameters are divided by both.

Where a gradient overflows, the step computes it again with a smaller scale. No batch is left out for it, and the result
is a function of the batch alone: there is no state.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

ROOM = 2**18  # the first scale lets a mean gradient be 1/4; but a token's part is never scaled down at first
FACTOR, SMALLEST = 2.0**6, 2.0**-16  # powers of two, which round nothing


def first_scale(tokens: int) -> float:
    """The scale to try first, for a sum over so many tokens."""
    return 2.0 ** (max(1, ROOM // tokens).bit_length() - 1)


def unscaled(params: Any, on_layer: Callable[[Any], Any] | None, factor: jax.Array) -> tuple[Any, Callable[[Any], Any]]:
    """Parameters whose gradients come multiplied by `factor`, and the function that does the same for a layer's."""
    outer = {key: _times(x, factor) for key, x in params.items() if key != "layers"}
    return outer | {"layers": params["layers"]}, lambda x: _times(on_layer(x) if on_layer else x, factor)


@jax.custom_vjp
def _times(params: Any, factor: jax.Array) -> Any:
    return params


_times.defvjp(
    lambda params, factor: (params, factor),
    lambda factor, grads: (jax.tree.map(lambda g: g * factor, grads), jnp.zeros_like(factor)),
)


def until_finite(gradients: Callable[[jax.Array], Any], finite: Callable[[Any], jax.Array], scale: float) -> Any:
    """`gradients(scale)`, or that of the largest smaller scale whose result is finite.

    Args:
      finite: whether a result is; the same on all devices, which therefore try as often.
    """

    def again(tried: tuple[jax.Array, jax.Array, Any]) -> tuple[jax.Array, jax.Array, Any]:
        scale = tried[0] / FACTOR
        result = gradients(scale)
        return scale, finite(result), result

    def wanted(tried: tuple[jax.Array, jax.Array, Any]) -> jax.Array:
        return ~tried[1] & (tried[0] > SMALLEST)

    before = jnp.float32(scale * FACTOR)
    nothing = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(gradients, before))
    return jax.lax.while_loop(wanted, again, (before, jnp.zeros((), bool), nothing))[2]
