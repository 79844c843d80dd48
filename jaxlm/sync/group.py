"""Collectives over groups of devices on the mapped axis. A device exchanges only within its group.

One flat axis can hold several directions: with 2 pipeline stages of 4 replicas each, `((0, 1, 2, 3), (4, 5, 6, 7))` are
the groups that average gradients. Everything here runs inside the mapped step, for all groups at once.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree


def over_gloo() -> bool:
    """Whether collectives go over Gloo: devices are CPUs of several processes."""
    return jax.default_backend() == "cpu" and jax.process_count() > 1


class Group(NamedTuple):
    axis: str  # of the mapped step
    size: int  # devices in each group
    members: tuple[tuple[int, ...], ...] | None = None  # each group's indices on the axis; None = one group of all
    platform: str = ""  # of the devices, cpu or gpu; "" = JAX's default

    @property
    def _index_groups(self) -> list[list[int]] | None:
        return None if self.members is None else [list(m) for m in self.members]

    @property
    def on_cpu(self) -> bool:
        return (self.platform or jax.default_backend()) == "cpu"

    def index(self) -> jax.Array:
        """This device's place in its group, 0 ... size - 1."""
        place = jax.lax.axis_index(self.axis)
        if self.members is None:
            return place
        table = np.zeros(sum(map(len, self.members)), np.int32)
        for group in self.members:
            table[list(group)] = range(self.size)
        return jnp.asarray(table)[place]

    def own_key(self, key: jax.Array) -> jax.Array:
        """A random key for each device of the group."""
        return jax.random.fold_in(key, self.index())

    def sum(self, tree: Any) -> Any:
        """All-reduce of a tree of arrays of one dtype."""

        def one(x: Any) -> Any:
            return jax.lax.psum(x, self.axis, axis_index_groups=self._index_groups)

        if not over_gloo():
            return one(tree)
        flat, back = ravel_pytree(tree)  # one array, because Gloo takes milliseconds for each
        return back(one(flat))

    def mean(self, tree: Any) -> Any:
        return jax.tree.map(lambda x: x / self.size, self.sum(tree))

    def max(self, x: jax.Array) -> jax.Array:
        return jax.lax.pmax(x, self.axis, axis_index_groups=self._index_groups)

    def gather(self, x: jax.Array) -> jax.Array:
        """All-gather: [...] -> [size, ...]."""
        return jax.lax.all_gather(x, self.axis, axis_index_groups=self._index_groups)

    def gather_all(self, arrays: list[jax.Array]) -> list[jax.Array]:
        """All-gather of several arrays. On CPU those of a dtype are joined, because each collective takes long there.
        GPUs need no copy, and can begin with the first array before the last one is there.
        """
        if not self.on_cpu:
            return [self.gather(x) for x in arrays]
        got: dict[int, jax.Array] = {}
        for dtype in dict.fromkeys(x.dtype for x in arrays):
            some = {i: x for i, x in enumerate(arrays) if x.dtype == dtype}
            sent = jnp.concatenate([x.reshape(-1) for x in some.values()])
            if dtype == jnp.bfloat16:  # XLA on CPU would widen it to float32
                bits_NC = self.gather(jax.lax.bitcast_convert_type(sent, jnp.uint16))
                all_NC = jax.lax.bitcast_convert_type(bits_NC, dtype)
            else:
                all_NC = self.gather(sent)
            got |= zip(some, _cut(all_NC, [x.shape for x in some.values()]), strict=True)
        return [got[i] for i in range(len(arrays))]

    def scatter_sum(self, x_NC: jax.Array) -> jax.Array:
        """Reduce-scatter: device i gets row i of the sum. [size, C] -> [C]"""
        summed = jax.lax.psum_scatter(x_NC, self.axis, axis_index_groups=self._index_groups, tiled=True)
        return summed.reshape(x_NC.shape[1:])

    def scatter_sums(self, arrays: list[jax.Array]) -> list[jax.Array]:
        """Reduce-scatter of several arrays [size, ...] of one dtype, joined as in `gather_all`: device i gets row i of
        each sum.
        """
        if not self.on_cpu:
            return [self.scatter_sum(x) for x in arrays]
        own_C = self.scatter_sum(jnp.concatenate([x.reshape(self.size, -1) for x in arrays], axis=1))
        return [x[0] for x in _cut(own_C[None], [x.shape[1:] for x in arrays])]

    def exchange(self, x: jax.Array, split: int = 0, concat: int = 0) -> jax.Array:
        """All-to-all: cuts dimension `split` into a piece for each device, and joins what arrives along `concat`."""
        return jax.lax.all_to_all(x, self.axis, split, concat, axis_index_groups=self._index_groups, tiled=True)

    def shift(self, x: jax.Array, by: int) -> jax.Array:
        """Sends x to the device `by` places ahead on the ring; returns what the device `by` places behind sent."""
        members = self.members or (tuple(range(self.size)),)
        pairs = [(m[i], m[(i + by) % self.size]) for m in members for i in range(self.size)]
        return jax.lax.ppermute(x, self.axis, pairs)


def _cut(x_NC: jax.Array, shapes: list[tuple[int, ...]]) -> list[jax.Array]:
    """Cuts rows into arrays, [N, C] -> [N, *shape] each."""
    cuts = np.cumsum([math.prod(shape) for shape in shapes])[:-1].tolist()
    return [x.reshape(-1, *shape) for x, shape in zip(jnp.split(x_NC, cuts, axis=1), shapes, strict=True)]
