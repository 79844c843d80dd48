"""Statistics of each layer (log.layer_stats), computed in every step: a branch for the steps that are logged saves
nothing that can be measured, but for models so small that a step takes 10 ms.

Gradients, updates and weights are of what is trained. No number depends on how the batch is split over devices and
micro-batches. Shapes: L layers.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxlm.config import STACKS, Config
from jaxlm.train.one_device import OneDevice

Stats = dict[str, jax.Array]


class Change(NamedTuple):
    """What a step does to the parameters, or with ZeRO to this device's parts of them."""

    grads: Any  # the mean over the devices, before clipping
    params: Any  # before the update
    updates: Any
    accepted: jax.Array  # by the guard; otherwise the update is not made


def make_layer_stats(config: Config, own: OneDevice) -> Callable[..., Stats]:
    """Returns the function (change, squares_L, tokens) -> statistics of a step, the same on all devices.

    `squares_L` are the sums of the squares of the layers' outputs over this device's tokens, of which there are
    `tokens`. The statistics are float32 [L], and scalars for the other parts of the model (embed, final_norm, head):

      layers/grad_norm, embed/grad_norm, ...: L2 norm of the gradient, before clipping.
      layers/update_ratio, embed/update_ratio, ...: L2 norm of the update divided by that of the parameters before it;
        0 if the guard left the step out.
      layers/activation_rms: root mean square of the residual stream behind the layer, over the global batch.
    """

    grid, sync = own.grid, own.sync

    def of_step(change: Change, squares_L: jax.Array, tokens: int) -> Stats:
        trees = (change.grads, change.params, change.updates)
        sums = sync.whole_sums([squares(tree, sync.share) for tree in trees])
        grads, params, updates = jax.tree.map(jnp.sqrt, sums)
        found = {f"{part}/grad_norm": norm for part, norm in grads.items()}
        for part, norm in updates.items():
            found[f"{part}/update_ratio"] = jnp.where(change.accepted, norm / params[part], 0.0)
        tokens_of_all = tokens * grid.copies.size
        found["layers/activation_rms"] = jnp.sqrt(grid.everyone.sum(squares_L) / (tokens_of_all * config.model.d_model))
        return found

    return of_step


def squares(tree: Any, share: Callable[[Any], float] = lambda path: 1.0) -> dict[str, Any]:
    """The sum of the squares of each part of a tree of parameters, such as `embed`; those of STACKS are [L].

    Each parameter counts with its share.
    """
    found: dict[str, Any] = {}
    for path, x in jax.tree_util.tree_flatten_with_path(tree)[0]:
        part = path[0].key
        total = share(path) * jnp.sum(jnp.square(x), axis=tuple(range(part in STACKS, x.ndim)))
        found[part] = found.get(part, 0) + total
    return found


def numbers(metrics: dict[str, Any]) -> dict[str, Any]:
    """The statistics among a step's metrics, as numbers and lists of L numbers."""
    return {key: jax.device_get(x).tolist() for key, x in metrics.items() if "/" in key}
