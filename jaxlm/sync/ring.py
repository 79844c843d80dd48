"""The mean in 2 (N - 1) steps between neighbours on a ring (Patarasuk and Yuan, 2009), written with `ppermute`.

Device i owns row i of the packed matrix. Reduce-scatter: a partial sum of each row travels once round the ring; each
device adds its own numbers as it passes, and it ends at the row's owner. All-gather: the sums travel once round. In
every step a device sends one row to its right and receives one from its left. It sends 2 (N - 1) / N times the bytes of
the gradients, and no all-reduce can send less.

With three devices or more, half of each row goes the other way round, to use both directions of the links between
neighbours (NVLink, PCIe), unless rows are short (BOTH_WAYS). With two devices both ways are the same.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from jaxlm.sync.base import Arrays, Reduction, Shape, State, stateless
from jaxlm.sync.group import Group
from jaxlm.sync.packed import pack, row_size, unpack, unpack_parts

BOTH_WAYS = 2**14  # numbers; a shorter row is not halved, because twice as many messages would cost more


def ring(group: Group) -> Reduction:
    n = group.size

    def directions(x: jax.Array) -> list[tuple[jax.Array, int]]:
        """The halves of rows [..., C], each with its direction round the ring."""
        if n < 3 or x.shape[-1] < BOTH_WAYS:
            return [(x, 1)]
        left, right = jnp.array_split(x, 2, axis=-1)
        return [(left, 1), (right, -1)]

    def scatter(x_NC: jax.Array) -> jax.Array:
        def one_way(x_NC: jax.Array, way: int) -> jax.Array:
            me = group.index()
            partial_C = x_NC[(me - way) % n]
            for step in range(n - 1):
                partial_C = group.shift(partial_C, way) + x_NC[(me - way * (step + 2)) % n]
            return partial_C

        return jnp.concatenate([one_way(x, way) for x, way in directions(x_NC)], axis=-1)

    def gather(own_C: jax.Array) -> jax.Array:
        def one_way(own_C: jax.Array, way: int) -> jax.Array:
            me = group.index()
            all_NC = jnp.zeros((n, *own_C.shape), own_C.dtype).at[me].set(own_C)
            for step in range(n - 1):
                own_C = group.shift(own_C, way)
                all_NC = all_NC.at[(me - way * (step + 1)) % n].set(own_C)
            return all_NC

        return jnp.concatenate([one_way(x, way) for x, way in directions(own_C)], axis=-1)

    def mean(arrays: Arrays, states: list[State]) -> tuple[Arrays, list[State]]:
        mean_NC = gather(scatter(pack(arrays, n)) / n)
        return unpack(mean_NC, [x.shape for x in arrays]), states

    def mean_parts(arrays: Arrays, states: list[State]) -> tuple[Arrays, list[State]]:
        return unpack_parts(scatter(pack(arrays, n)) / n, [x.shape for x in arrays], n), states

    def sent_bytes(shapes: Sequence[Shape], parts: bool) -> float:
        return (1 if parts else 2) * (n - 1) * 4 * row_size(shapes, n)

    return Reduction(stateless, mean, mean_parts, sent_bytes)
