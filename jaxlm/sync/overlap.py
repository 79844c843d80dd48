"""Reduces gradients while the backward pass still runs.

A layer's parameters pass through `_used`, an identity, before they are used. Its backward pass runs as soon as the
layer's gradient is complete, and averages that gradient over the devices. With scanned layers the collective is thus in
the body of the backward loop, where XLA's scheduler can run the next layer's computation beside it. With ZeRO-3,
`_used` is not an identity, but gathers the layer's parameters from the devices that hold them.

A backward pass can return its results only as gradients. So `_used` takes two arguments that it ignores, *slots*,
with the shapes of the two results. The gradient of the first is the reduced gradient of the parameters (or this
device's parts of it); the gradient of the second is the reduction's new state.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxlm.config import STACKS
from jaxlm.sync.base import GradSync

SLOTS = "slots"  # the key of a layer's slots beside its parameters


class Slots(NamedTuple):
    mean: Any  # shapes of the reduced gradient; the content is ignored
    state: Any  # of the reduction
    before: Any | None  # gradient of earlier micro-batches, which is added before the reduction


def gradients(
    loss: Callable[[Any, Callable[[Any, str], Any]], tuple[jax.Array, Any]],
    params: Any,
    before: Any | None,
    sync: GradSync,
    state: Any,
) -> tuple[Any, Any, Any]:
    """Computes the gradient of a loss, and reduces each layer's part over the devices as soon as it is complete.

    Args:
      loss: (params, on_layer) -> (loss, aux); it applies `on_layer` to a layer's parameters
        and the key of their stack before it uses them.
      params: what this device holds of them; `loss` gets whole ones.
      before: the gradient of earlier micro-batches, or None.

    Returns:
      (`sync.reduce` of the gradient of `loss` plus `before`, the reduction's new state, aux).
    """
    means = jax.tree.map(lambda s: jnp.zeros(s.shape, jnp.float32), jax.eval_shape(sync.own, params))

    def hooked(slots: tuple[Any, Any]) -> tuple[jax.Array, Any]:
        each = {k: Slots(slots[0][k], slots[1][k], None if before is None else before[k]) for k in params}
        outer = {k: _used(sync, k, params[k], each[k]) for k in params if k not in STACKS}
        stacks = {k: params[k] for k in params if k in STACKS}
        for k in stacks if sync.mixes else ():
            if jax.tree.leaves(stacks[k]):
                stacks[k], each[k] = after(stacks[k], outer), each[k]._replace(mean=after(each[k].mean, outer))
        if sync.mixes and not jax.tree.leaves(stacks) and "embed" in outer:
            outer["embed"] = after(outer["embed"], {k: x for k, x in outer.items() if k != "embed"})

        def on_layer(layer: Any, stack: str) -> Any:
            held = {k: x for k, x in layer.items() if k != SLOTS}
            return _used(sync, stack, held, layer[SLOTS])

        return loss(outer | {k: x | {SLOTS: each[k]} for k, x in stacks.items()}, on_layer)

    (mean, state), more = jax.grad(hooked, has_aux=True)((means, state))
    return mean, state, more


def after(tree: Any, others: Any) -> Any:
    """Returns the tree, whose smallest array then depends on all `others`, and their gradients on its gradient.

    XLA's CPU backend may run a collective at the same time as a loop that does not depend on it, and mix it up with
    those in the loop (jax 0.10.2): the process aborts or hangs. So the loop over layers waits for the collectives
    before it, and in the backward pass those of other parameters wait for the loop. XLA does not replace 0 * x by 0,
    because x might be infinite.
    """
    leaves, structure = jax.tree.flatten(tree)
    i = min(range(len(leaves)), key=lambda i: leaves[i].size)
    token = 0 * sum(x.reshape(-1)[0].astype(jnp.float32) for x in jax.tree.leaves(others))
    leaves[i] += jnp.asarray(token).astype(leaves[i].dtype)
    return structure.unflatten(leaves)


def _used(sync: GradSync, key: str, held: Any, slots: Slots) -> Any:
    """Returns the whole of params[key] or of one layer, with the backward pass described above.

    Tables and the output layer are float32 then, in whatever dtype they are held, so that their gradients add up in it.
    """

    def forward(held: Any) -> Any:
        whole = held if sync.gather is None else sync.gather(key, held)
        return whole if key in STACKS else jax.tree.map(lambda x: x.astype(jnp.float32), whole)

    def backward(residuals: tuple[Any, Slots], grads: Any) -> tuple[Any, Slots]:
        held, slots = residuals
        total = jax.tree.map(lambda g: g.astype(jnp.float32), grads)
        if slots.before is not None:
            total = jax.tree.map(jnp.add, total, slots.before)
        mean, state = sync.reduce(_stacked(key, total), _stacked(key, slots.state))

        def shaped(result: Any, like: Any) -> Any:
            return jax.tree.map(lambda x, slot: x.reshape(slot.shape), result[key], like)

        new = Slots(shaped(mean, slots.mean), shaped(state, slots.state), slots.before)
        return jax.tree.map(jnp.zeros_like, held), new

    used = jax.custom_vjp(lambda held, slots: forward(held))
    used.defvjp(lambda held, slots: (forward(held), (held, slots)), backward)
    return used(held, slots)


def _stacked(key: str, tree: Any) -> dict[str, Any]:
    """A subtree where it is in the tree of all parameters; a single layer becomes a stack of one."""
    return {key: jax.tree.map(lambda x: x[None], tree) if key in STACKS else tree}
