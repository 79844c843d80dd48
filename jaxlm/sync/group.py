"""Collectives over groups of devices on the mapped axis. A device exchanges only within its group.

One flat axis can hold several directions: with 2 pipeline stages of 4 replicas each, `((0, 1, 2, 3), (4, 5, 6, 7))` are
the groups that average gradients. Everything here runs inside the mapped step, for all groups at once.
"""

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

    def index(self) -> jax.Array:
        """This device's place in its group, 0 ... size - 1."""
        place = jax.lax.axis_index(self.axis)
        if self.members is None:
            return place
        table = np.zeros(sum(map(len, self.members)), np.int32)
        for group in self.members:
            table[list(group)] = range(self.size)
        return jnp.asarray(table)[place]

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

    def scatter_sum(self, x_NC: jax.Array) -> jax.Array:
        """Reduce-scatter: device i gets row i of the sum. [size, C] -> [C]"""
        summed = jax.lax.psum_scatter(x_NC, self.axis, axis_index_groups=self._index_groups, tiled=True)
        return summed.reshape(x_NC.shape[1:])

    def exchange(self, x: jax.Array, split: int = 0, concat: int = 0) -> jax.Array:
        """All-to-all: cuts dimension `split` into a piece for each device, and joins what arrives along `concat`."""
        return jax.lax.all_to_all(x, self.axis, split, concat, axis_index_groups=self._index_groups, tiled=True)

    def shift(self, x: jax.Array, by: int) -> jax.Array:
        """Sends x to the device `by` places ahead on the ring; returns what the device `by` places behind sent."""
        members = self.members or (tuple(range(self.size)),)
        pairs = [(m[i], m[(i + by) % self.size]) for m in members for i in range(self.size)]
        return jax.lax.ppermute(x, self.axis, pairs)
