"""ZeRO (Rajbhandari et al., ZeRO, 2020): each of N devices holds and updates 1/N of what is the same on all of them.

| parallel.zero | a device holds its parts of | and gets whole |
| --- | --- | --- |
| 1 | the optimizer's state | parameters, after the update |
| 2 | the optimizer's state, the gradient | parameters, after the update |
| 3 | the optimizer's state, the gradient, parameters | one layer's parameters, when a pass needs them (FSDP) |

Device i owns part i of every tensor (packed.py). It receives that part of the mean gradient (a reduce-scatter) and
updates it. With 1 and 2 it then sends its part of the new parameters to all (an all-gather). With 3 the forward pass
gathers each layer, in the dtype of the computation, and drops it; the backward pass gathers it again (overlap.py).

Bytes: the parts of the gradients, by the reduction in use, with 2 and 3 in every micro-batch. For parameters (N - 1)
times the parts of float32 numbers; with 3, in every micro-batch, (N - 1) times the parts of what is gathered, for
layers twice. With pmean and one micro-batch, 1 and 2 send together as much as without ZeRO, and 3 in bfloat16 as well.
Memory: each tensor is padded to a multiple of N numbers.

A tree of parts has the structure of the whole one, with leaves [l, c]: l layers of a stacked parameter, or 1. For
optimizers that look at whole layers (Muon) or whole matrices (Adafactor), sharing.py and `whole` join the parts.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp

from jaxlm.config import STACKS
from jaxlm.sync.base import Arrays, Shape
from jaxlm.sync.buckets import in_buckets
from jaxlm.sync.group import Group
from jaxlm.sync.packed import join, part_shape, split

PARAMETERS = "gather_parameters"  # names its collectives in a compiled program


def is_stacked(path: Any) -> bool:
    """Whether the leaf at this path, a parameter or its optimizer state, has a leading layer dimension."""
    return any(getattr(key, "key", None) in STACKS for key in path)


def batch_shape(path: Any, x: Any) -> Shape:
    """`[l, ...]` for a stacked leaf, `[1, size]` for any other."""
    return tuple(x.shape) if is_stacked(path) else (1, math.prod(x.shape))


def batch(path: Any, x: jax.Array) -> jax.Array:
    return x.reshape(batch_shape(path, x))


def spread(tree: Any, n: int) -> Any:
    """Cuts parameters or optimizer state into parts for n devices, leaves [n, l, c]; a scalar becomes n copies, [n]."""

    def parts(path: Any, x: jax.Array) -> jax.Array:
        return split(batch(path, x), n) if x.ndim else jnp.broadcast_to(x, (n,))

    return jax.tree_util.tree_map_with_path(parts, tree)


def joined(parts: Any, like: Any) -> Any:
    """The inverse of `spread`; `like` gives the shapes."""

    def whole(path: Any, x: Any, parts: jax.Array) -> jax.Array:
        return join(parts, batch_shape(path, x)).reshape(x.shape) if x.ndim else parts[0]

    return jax.tree_util.tree_map_with_path(whole, like, parts)


class Zero:
    """Cuts and joins parts inside the mapped step, as one device sees them."""

    def __init__(self, group: Group, params: Any, limit: int | None = None):
        """Args: params: the shapes of all parameters; limit: most bytes gathered at once, None = all."""
        self.group, self._limit = group, limit
        self._shapes = {path: tuple(x.shape) for path, x in jax.tree_util.tree_flatten_with_path(params)[0]}

    def shape(self, path: Any, num_layers: int) -> Shape:
        """The shape of the parameter at a path, with `num_layers` layers if it is stacked."""
        shape = self._shapes[path]
        return (num_layers, *shape[1:]) if is_stacked(path) else shape

    def own(self, tree: Any) -> Any:
        """Returns this device's parts of a tree of whole leaves."""
        everyones, me = spread(tree, self.group.size), self.group.index()
        return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, me, keepdims=False), everyones)

    @jax.named_scope(PARAMETERS)
    def whole(self, parts: Any, like: Any = None) -> Any:
        """The inverse of `own`, a gather over all devices; `like` gives the shapes, by default the parameters', of as
        many layers as the parts have.
        """
        if like is None:
            like = jax.tree_util.tree_map_with_path(
                lambda path, x: jax.ShapeDtypeStruct(self.shape(path, x.shape[0]), x.dtype), parts
            )
        flat, tree = jax.tree.flatten(parts)
        leaves = [x for x in flat if x.ndim]

        def gather(arrays: Arrays, states: list[Any]) -> tuple[Arrays, list[Any]]:
            everyones = self.group.gather_all(arrays)
            return [x.swapaxes(0, 1) for x in everyones], states  # with l first, as `in_buckets` requires

        shapes = [(x.shape[0], x.shape[1] * self.group.size) for x in leaves]
        got, _ = in_buckets(gather, leaves, [()] * len(leaves), shapes, self._limit)
        arrays = iter(got)
        everyones = [next(arrays).swapaxes(0, 1) if x.ndim else x[None] for x in flat]
        return joined(tree.unflatten(everyones), like)

    def sent_bytes(self, tree: Any) -> float:
        """Bytes that a device sends in `whole`, for whole leaves of these shapes and dtypes."""
        n = self.group.size

        def one(path: Any, x: Any) -> float:
            return (n - 1) * math.prod(part_shape(batch_shape(path, x), n)) * x.dtype.itemsize

        return sum(jax.tree.leaves(jax.tree_util.tree_map_with_path(one, tree)))
