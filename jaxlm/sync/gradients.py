"""Applies a reduction to gradients: of the whole model, of some parameters, or of one layer."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxlm.config import STACKS, ParallelConfig
from jaxlm.sync.base import GradSync, Reduction
from jaxlm.sync.buckets import in_buckets, piece_shapes, plan
from jaxlm.sync.cuts import Cuts
from jaxlm.sync.group import Group
from jaxlm.sync.zero import Zero, batch, batch_shape

GRADIENTS = "reduce_gradients"  # names its collectives in a compiled program


def make_grad_sync(
    reduction: Reduction, group: Group, params: Any, config: ParallelConfig, cuts: Cuts | None = None
) -> GradSync:
    """Returns the synchronization that the step calls, in buckets of `bucket_mb`. With `zero`, a device gets only
    its own parts.

    Args:
      params: shapes of what a device holds of all parameters, trained or not, without ZeRO.
      cuts: how further devices divide the parameters; None = not at all.
    """
    zero, limit = config.zero > 0, max(1, int(config.bucket_mb * 2**20)) if config.bucket_mb else None
    if cuts and group.on_cpu:  # where the first bucket would run beside the model's collectives (overlap.after)
        limit = None
    reduce_bucket = reduction.mean_parts if zero else reduction.mean
    assert reduce_bucket is not None  # validate.py refuses zero with the others

    @jax.named_scope(GRADIENTS)
    def reduce(grads: Any, state: Any) -> tuple[Any, Any]:
        if cuts:
            grads = cuts.summed(grads)
        leaves, tree = jax.tree.flatten(jax.tree_util.tree_map_with_path(batch, grads))
        means, states = in_buckets(reduce_bucket, leaves, tree.flatten_up_to(state), [x.shape for x in leaves], limit)
        if not zero:
            means = [m.reshape(x.shape) for m, x in zip(means, jax.tree.leaves(grads), strict=True)]
        return tree.unflatten(means), tree.unflatten(states)

    def sent_bytes(params: Any) -> float:
        leaves, _ = jax.tree_util.tree_flatten_with_path(params)
        shapes = {path: batch_shape(path, x) for path, x in leaves}
        together = [list(shapes.values())]
        if config.by_layer:  # one call for each layer, and one for each other key
            together = [[s for path, s in shapes.items() if path[0].key == key] for key in params if key not in STACKS]
            for stack in STACKS:
                layers = [s for path, s in shapes.items() if path[0].key == stack]
                together += [[(1, *s[1:]) for s in layers]] * (layers[0][0] if layers else 0)
        return sum(
            reduction.sent_bytes(piece_shapes(bucket, shapes), zero)
            for shapes in together
            for bucket in plan(shapes, limit)
        )

    def init(params: Any) -> Any:
        return jax.tree_util.tree_map_with_path(lambda path, x: reduction.init(batch(path, x)), params)

    parts = Zero(group, params, limit)

    def gather(key: str, held: Any) -> Any:
        if key not in STACKS:
            return parts.whole({key: held})[key]
        whole = parts.whole({key: jax.tree.map(lambda x: x[None], held)})[key]
        return jax.tree.map(lambda x: x[0], whole)

    def same(tree: Any) -> Any:
        return tree

    def whole_sums(sums: Any) -> Any:
        sums = cuts.sums(sums) if cuts else sums
        return group.sum(sums) if zero else sums

    def share(path: Any) -> float:
        return 1 / cuts.holders(path) if cuts else 1.0

    def global_norm(grads: Any) -> jax.Array:
        if not (zero or cuts):
            return optax.tree.norm(grads)
        leaves, _ = jax.tree_util.tree_flatten_with_path(grads)
        return jnp.sqrt(whole_sums(sum(share(path) * jnp.sum(jnp.square(x)) for path, x in leaves)))

    holds_whole = config.zero in (1, 2)  # but updates parts
    return GradSync(
        init=init,
        reduce=reduce,
        own=parts.own if holds_whole else same,
        whole=parts.whole if holds_whole else same,
        gather=gather if config.zero == 3 else None,
        mixes=group.on_cpu,
        global_norm=global_norm,
        share=share,
        whole_sums=whole_sums,
        sent_bytes=sent_bytes,
    )
