"""The interfaces of gradient synchronization: pure functions with explicit state, as in optax.

A `Reduction` averages arrays over a group of devices; each strategy is one. Arrays come as float32 batches `[l, ...]`
of l tensors of one shape, the layers of a stacked parameter, or as `[1, size]` of a single tensor. With N devices, each
tensor is cut into N parts (packed.py), of which device i owns the i-th.

A `GradSync` is what the step calls: a reduction applied to the tree of gradients, in buckets (gradients.py), and with
ZeRO-1 (zero.py) the parts that a device updates.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

Arrays = list[jax.Array]
State = dict[str, jax.Array]  # of one array, leaves [l, ...]: {"residual": ...}
Shape = tuple[int, ...]


class Reduction(NamedTuple):
    # array -> what is remembered of it from step to step; the initial one is the same on all devices
    init: Callable[[jax.Array], State]
    # (arrays, states) -> (their means, the same on all devices; states)
    mean: Callable[[Arrays, list[State]], tuple[Arrays, list[State]]]
    # The same, of which each device gets its own parts [l, c] alone; None where that would save nothing.
    mean_parts: Callable[[Arrays, list[State]], tuple[Arrays, list[State]]] | None
    # (shapes of arrays that are reduced together, only parts?) -> bytes that a device sends for them
    sent_bytes: Callable[[Sequence[Shape], bool], float]


def sizes(x: jax.Array) -> jax.Array:
    """Absolute values, infinite also where a number is none: no backend promises that a maximum is none then. XLA's on
    CPU leaves it out."""
    return jnp.where(jnp.isfinite(x), jnp.abs(x), jnp.inf)


def is_matrix(shape: Shape) -> bool:
    """Whether it is the matrix of each layer."""
    return len(shape) > 2


def stateless(array: jax.Array) -> State:
    return {}


class GradSync(NamedTuple):
    """Runs per device, inside the mapped step, but for `init`. Trees are like the parameters'."""

    # params -> what a device remembers from step to step: for each parameter a `State`
    init: Callable[[Any], Any]
    # (grads, state) -> (mean of grads over the devices, or this device's parts of it, state); of some parameters too
    reduce: Callable[[Any, Any], tuple[Any, Any]]
    own: Callable[[Any], Any]  # params -> what of them this device updates
    whole: Callable[[Any], Any]  # the inverse, with what the others have updated
    global_norm: Callable[[Any], jax.Array]  # L2 norm of what `reduce` gave, over all devices
    sent_bytes: Callable[[Any], float]  # params -> bytes that a device sends for their gradients in a step
