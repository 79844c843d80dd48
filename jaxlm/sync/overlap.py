"""Reduces gradients while the backward pass still runs.

A layer's parameters pass through `_reduced`, an identity, before they are used. Its backward pass runs as soon as the
layer's gradient is complete, and averages that gradient over the devices. With scanned layers the collective is thus in
the body of the backward loop, where XLA's scheduler can run the next layer's computation beside it.

A backward pass can return its results only as gradients. So `_reduced` takes two arguments that it ignores, *slots*,
with the shapes of the two results. The gradient of the first is the reduced gradient of the parameters (or this
device's parts of it); the gradient of the second is the reduction's new state.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxlm.sync.base import GradSync

SLOTS = "slots"  # the key of a layer's slots beside its parameters


class Slots(NamedTuple):
    mean: Any  # shapes of the reduced gradient; the content is ignored
    state: Any  # of the reduction
    before: Any | None  # gradient of earlier micro-batches, which is added before the reduction


def gradients(
    loss: Callable[[Any, Callable[[Any], Any]], tuple[jax.Array, Any]],
    params: Any,
    before: Any | None,
    sync: GradSync,
    state: Any,
) -> tuple[Any, Any, Any]:
    """Computes the gradient of a loss, and reduces each layer's part over the devices as soon as it is complete.

    Args:
      loss: (params, on_layer) -> (loss, aux); it applies `on_layer` to a layer's parameters before it uses them.
      before: the gradient of earlier micro-batches, or None.

    Returns:
      (`sync.reduce` of the gradient of `loss` plus `before`, the reduction's new state, aux).
    """
    means = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(sync.own, params))

    def hooked(slots: tuple[Any, Any]) -> tuple[jax.Array, Any]:
        each = {k: Slots(slots[0][k], slots[1][k], None if before is None else before[k]) for k in params}
        outer = {k: _reduced(sync, params[k], each[k], lambda x, k=k: {k: x}) for k in params if k != "layers"}

        def on_layer(layer: Any) -> Any:
            own = {k: x for k, x in layer.items() if k != SLOTS}
            return _reduced(sync, own, layer[SLOTS], lambda x: {"layers": jax.tree.map(lambda y: y[None], x)})

        return loss(outer | {"layers": params["layers"] | {SLOTS: each["layers"]}}, on_layer)

    (mean, state), more = jax.grad(hooked, has_aux=True)((means, state))
    return mean, state, more


def _reduced(sync: GradSync, params: Any, slots: Slots, wrap: Callable[[Any], dict[str, Any]]) -> Any:
    """The identity on parameters, with the backward pass described above.

    `wrap` puts a subtree where it is in the tree of all parameters; a single layer becomes a stack of one.
    """

    def backward(slots: Slots, grads: Any) -> tuple[Any, Slots]:
        total = grads if slots.before is None else jax.tree.map(jnp.add, grads, slots.before)
        results = sync.reduce(wrap(total), wrap(slots.state))
        mean, state = (
            jax.tree.map(lambda x, slot: x.reshape(slot.shape), result[key], like)
            for result, like in zip(results, (slots.mean, slots.state), strict=True)
            for key in result
        )
        return jax.tree.map(jnp.zeros_like, grads), Slots(mean, state, slots.before)

    identity = jax.custom_vjp(lambda params, slots: params)
    identity.defvjp(lambda params, slots: (params, slots), backward)
    return identity(params, slots)
