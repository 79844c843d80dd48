"""Loss scaling for float16, which holds numbers from 6e-8 to 65504.

In the gradient of a mean over tokens, each token's part shrinks with the number of tokens, and in a large batch most
parts round to zero. So the step differentiates the sum over tokens times a scale, and divides the float32 gradients of
the parameters by the scale and the number of tokens.

If a gradient overflows, the step computes it again with a smaller scale. No batch is left out, and the result depends
on the batch alone, because there is no state.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxlm.config import STACKS

ROOM = 2**18  # the first scale leaves room for a mean gradient of 1/4, and is at least 1
SEARCH = "search_loss_scale"  # names the loop in a compiled program
FACTOR, SMALLEST = 2.0**6, 2.0**-16  # powers of two, so that scaling rounds nothing


def first_scale(tokens: int) -> float:
    """The first scale to try, for a sum over `tokens` tokens."""
    return 2.0 ** (max(1, ROOM // tokens).bit_length() - 1)


def unscaled(params: Any, on_layer: Callable | None, factor: jax.Array) -> tuple[Any, Callable[[Any, str], Any]]:
    """Returns parameters whose gradients come out multiplied by `factor`, and an `on_layer` that does the same for a
    layer's parameters.
    """
    outer = {key: _times(x, factor) for key, x in params.items() if key not in STACKS}
    return params | outer, lambda x, stack: _times(on_layer(x, stack) if on_layer else x, factor)


@jax.custom_vjp
def _times(params: Any, factor: jax.Array) -> Any:
    return params


_times.defvjp(
    lambda params, factor: (params, factor),
    lambda factor, grads: (jax.tree.map(lambda g: g * factor, grads), jnp.zeros_like(factor)),
)


def until_finite(gradients: Callable[[jax.Array], Any], finite: Callable[[Any], jax.Array], scale: float) -> Any:
    """Returns `gradients(scale)` if it is finite, else the result of the largest smaller scale whose result is finite.

    Args:
      finite: whether a result is finite; the same on all devices, so that all try equally often.
    """

    def again(tried: tuple[jax.Array, jax.Array, Any]) -> tuple[jax.Array, jax.Array, Any]:
        scale = tried[0] / FACTOR
        result = gradients(scale)
        return scale, finite(result), result

    def wanted(tried: tuple[jax.Array, jax.Array, Any]) -> jax.Array:
        return ~tried[1] & (tried[0] > SMALLEST)

    before = jnp.float32(scale * FACTOR)
    nothing = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(gradients, before))
    with jax.named_scope(SEARCH):
        return jax.lax.while_loop(wanted, again, (before, jnp.zeros((), bool), nothing))[2]
