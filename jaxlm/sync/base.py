"""The interfaces of gradient synchronization: pure functions with explicit state, as in optax.

A `Reduction` averages arrays over a group of devices; each strategy is one. It takes float32 arrays `[l, ...]`: the l
layers of a stacked parameter, or `[1, size]` for a single tensor. With N devices each tensor is cut into N parts
(packed.py), and device i owns part i.

A `GradSync` is what the step calls. It applies a reduction to the tree of gradients in buckets (gradients.py), and with
ZeRO (zero.py) knows which parts a device updates, and which it holds.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

Arrays = list[jax.Array]
State = dict[str, jax.Array]  # state for one array, leaves [l, ...], such as {"residual": ...}
Shape = tuple[int, ...]


class Reduction(NamedTuple):
    # array -> initial state, the same on all devices; it is carried from step to step
    init: Callable[[jax.Array], State]
    # (arrays, states) -> (their means, the same on all devices; states)
    mean: Callable[[Arrays, list[State]], tuple[Arrays, list[State]]]
    # The same, but each device gets only its own parts [l, c] of the means. None if that would save nothing.
    mean_parts: Callable[[Arrays, list[State]], tuple[Arrays, list[State]]] | None
    # (shapes of arrays reduced together, True for `mean_parts`) -> bytes that a device sends for them
    sent_bytes: Callable[[Sequence[Shape], bool], float]


def magnitudes(x: jax.Array) -> jax.Array:
    """Absolute values, with inf in place of NaN, because `max` need not propagate NaN; XLA's on CPU does not."""
    return jnp.where(jnp.isfinite(x), jnp.abs(x), jnp.inf)


def is_stacked_matrix(shape: Shape) -> bool:
    """True for stacked matrices [l, in, out]."""
    return len(shape) > 2


def stateless(array: jax.Array) -> State:
    return {}


class GradSync(NamedTuple):
    """All but `init` and `sent_bytes` run inside the mapped step. Trees have the structure of the parameters."""

    # params -> the state of each parameter's reduction
    init: Callable[[Any], Any]
    # (grads, state) -> (mean of grads over the devices, or this device's parts of it; state). Also for a subtree.
    reduce: Callable[[Any, Any], tuple[Any, Any]]
    own: Callable[[Any], Any]  # what this device holds of the params -> the parts that it updates
    whole: Callable[[Any], Any]  # the inverse: updated parts of all devices -> what this device holds
    # (key, what this device holds of params[key], of `layers` for a single one) -> whole arrays. None = it holds all.
    gather: Callable[[str, Any], Any] | None
    mixes: bool  # whether the platform mixes up collectives that run at once: see `after` in overlap.py
    global_norm: Callable[[Any], jax.Array]  # L2 norm of the whole mean gradient, from what `reduce` returned
    # path of a parameter -> share with which what `reduce` or `own` returned of it counts in `whole_sums`: less than 1
    # if several devices hold the same
    share: Callable[[Any], float]
    whole_sums: Callable[[Any], Any]  # sums over what `reduce` or `own` returned -> sums over the whole arrays
    sent_bytes: Callable[[Any], float]  # params -> bytes that a device sends for their gradients in a step
