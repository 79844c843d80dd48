"""The interface of a gradient-synchronization strategy: pure functions with explicit state, as in optax.

All but `init` run per device, inside the mapped step, where collectives over the device axis may be used.
A strategy owns how gradients become those of the global batch, and which part of the parameters each device
updates: the step computes `reduce`, clips by `global_norm`, updates what `shard` gives, and `gather`s it.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import optax


def _identity(tree: Any) -> Any:
    return tree


class GradSync(NamedTuple):
    # (params, num_devices) -> what the strategy remembers from step to step, e.g. the residuals of a lossy
    # one: leaves [num_devices, ...], of which each device is given its own. Part of the checkpoint.
    init: Callable[[Any, int], Any]
    # (grads, state) -> (mean of grads over the devices, or this device's shard of it, state)
    reduce: Callable[[Any, Any], tuple[Any, Any]]
    shard: Callable[[Any], Any] = _identity  # parameters -> the part that this device updates
    gather: Callable[[Any], Any] = _identity  # the inverse, with the parts of the other devices
    global_norm: Callable[[Any], Any] = optax.tree.norm  # L2 norm of what `reduce` gave, over all devices
