"""How the devices of a tensor group divide each parameter: nowhere written down, but read off the model.

The model of one device has smaller arrays than the whole one. Where a dimension is smaller, it is cut: into one part
for each device or, as with few key/value heads, into fewer, so that neighbours hold the same part. An array that is not
smaller has one part, which all devices hold. If a dimension does not divide, as with token tables, the last parts are
padded with zeros.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxlm.sync.base import Shape
from jaxlm.sync.group import Group
from jaxlm.sync.overlap import after
from jaxlm.sync.zero import is_stacked

COPIES = "sum_copies"  # names its collectives in a compiled program


class Cut(NamedTuple):
    dim: int  # that is cut
    parts: int  # 1 = not cut
    size: int  # of a part
    whole: int  # size of all, without padding

    @property
    def divides(self) -> bool:
        return self.parts * self.size == self.whole


def cut_of(whole: Shape, own: Shape, devices: int) -> Cut:
    """The cut of an array of shape `whole`, of which each of the devices holds a part of shape `own`."""
    assert len(whole) == len(own), (whole, own)
    smaller = [i for i, (all_, part) in enumerate(zip(whole, own, strict=True)) if part != all_]
    if not smaller:
        return Cut(0, 1, 1, 1)
    assert len(smaller) == 1, (whole, own)
    (dim,) = smaller
    parts = next(p for p in range(1, devices + 1) if devices % p == 0 and p * own[dim] >= whole[dim])
    return Cut(dim, parts, own[dim], whole[dim])


def cuts_of(whole: Any, own: Any, devices: int) -> Any:
    """The cut of each array of a tree."""
    return jax.tree.map(lambda w, o: cut_of(tuple(w.shape), tuple(o.shape), devices), whole, own)


class Cuts:
    """What the devices of a replica know of their parameters, inside the mapped step. Those of a pipeline have the
    layers of a stage, and all of the other parameters; those of a tensor group have parts of both.
    """

    def __init__(self, group: Group, pipeline: Group, whole: Any, own: Any):
        """Args: group: of the tensor direction; whole, own: shapes of what a stage and what a device holds."""
        self.group, self.pipeline = group, pipeline
        flat, _ = jax.tree_util.tree_flatten_with_path(cuts_of(whole, own, group.size), is_leaf=is_cut)
        self._cuts: dict[Any, Cut] = dict(flat)

    def copies(self, path: Any) -> int:
        """How many devices of a tensor group hold the same part of a parameter."""
        return self.group.size // self._cuts[path].parts

    def holders(self, path: Any) -> int:
        """How many devices of a replica hold the same part of a parameter."""
        return self.copies(path) * (1 if is_stacked(path) else self.pipeline.size)

    def sums(self, tree: Any) -> Any:
        """Sums over all devices of a replica."""
        return self.pipeline.sum(self.group.sum(tree))

    def summed(self, grads: Any) -> Any:
        """Adds up the gradients of devices that hold the same part, because each has only its own contribution."""
        leaves, tree = jax.tree_util.tree_flatten_with_path(grads)
        found = dict(leaves)
        groups = {copies: self._neighbours(copies) for copies in sorted({self.copies(path) for path in found} - {1})}
        for copies, group in groups.items():
            found |= self._summed(group, found, [path for path in found if self.copies(path) == copies])
        if self.pipeline.size > 1:
            found |= self._summed(self.pipeline, found, [path for path in found if not is_stacked(path)])
        return tree.unflatten(found.values())

    def _summed(self, group: Group, found: dict[Any, jax.Array], paths: list[Any]) -> dict[Any, jax.Array]:
        arrays = [found[path] for path in paths]
        if group.on_cpu and arrays:
            arrays = after(arrays, list(found.values()))
        with jax.named_scope(COPIES):
            return dict(zip(paths, group.sum(arrays), strict=True)) if arrays else {}

    def whole(self, parts: Any) -> Any:
        """Gathers whole parameters, or arrays of their shapes, of as many layers as the parts have."""
        return jax.tree_util.tree_map_with_path(self._whole, parts)

    def own(self, tree: Any) -> Any:
        """The inverse of `whole`."""
        return jax.tree_util.tree_map_with_path(self._own, tree)

    def on_matrices(self, path: Any, x: jax.Array, act: Callable[[jax.Array], jax.Array]) -> jax.Array:
        """Applies a function of whole layers to layers `[l, ...]` of which this device holds a part. Each device of the
        group works on some of the layers.
        """
        cut = self._cuts[path]
        if cut.parts == 1:
            return act(x)
        assert cut.divides
        padded = jnp.pad(x, ((0, -len(x) % self.group.size), *[(0, 0)] * (x.ndim - 1)))
        some = self.group.exchange(padded, split=0, concat=cut.dim)
        acted = _repeated(act(_once(some, cut, self.copies(path))), cut, self.copies(path))
        return self.group.exchange(acted, split=cut.dim, concat=0)[: len(x)]

    def _whole(self, path: Any, x: jax.Array) -> jax.Array:
        cut = self._cuts[path]
        if cut.parts == 1:
            return x
        joined = jnp.concatenate(list(self.group.gather(x)[:: self.copies(path)]), axis=cut.dim)
        return jax.lax.slice_in_dim(joined, 0, cut.whole, axis=cut.dim)

    def _own(self, path: Any, x: jax.Array) -> jax.Array:
        cut = self._cuts[path]
        if cut.parts == 1:
            return x
        more = cut.parts * cut.size - cut.whole
        x = jnp.pad(x, [(0, more if i == cut.dim else 0) for i in range(x.ndim)])
        place = self.group.index() // self.copies(path)
        return jax.lax.dynamic_slice_in_dim(x, place * cut.size, cut.size, cut.dim)

    def _neighbours(self, copies: int) -> Group:
        members = self.group.members or (tuple(range(self.group.size)),)
        groups = [m[i : i + copies] for m in members for i in range(0, len(m), copies)]
        return self.group._replace(size=copies, members=tuple(groups))


def is_cut(x: Any) -> bool:
    return isinstance(x, Cut)


def _once(x: jax.Array, cut: Cut, copies: int) -> jax.Array:
    """Keeps one of `copies` equal neighbouring parts."""
    before, after = x.shape[: cut.dim], x.shape[cut.dim + 1 :]
    return x.reshape(*before, cut.parts, copies, cut.size, *after).take(0, cut.dim + 1).reshape(*before, -1, *after)


def _repeated(x: jax.Array, cut: Cut, copies: int) -> jax.Array:
    """The inverse of `_once`."""
    before, after = x.shape[: cut.dim], x.shape[cut.dim + 1 :]
    parts = x.reshape(*before, cut.parts, cut.size, *after)
    return jnp.repeat(parts, copies, axis=cut.dim).reshape(*before, -1, *after)
