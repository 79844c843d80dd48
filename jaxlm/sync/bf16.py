"""The mean with bfloat16 on the wire and float32 in the sums.

Each device sends to every other device the part that the other owns, rounded. The owner adds up in float32, rounds the
mean and sends it to all. That rounds twice, whatever the number of devices; an all-reduce of bfloat16 would round after
every addition. The numbers travel as 16-bit integers, because XLA on CPU would widen bfloat16 to float32.

Bytes: 2 (N - 1) / N * 2 for each number, half of pmean's. Error of an element: at most 2^-8 of the mean of its absolute
values, plus 2^-8 of the mean (8 bits of precision, rounded to nearest). That needs no error feedback.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from jaxlm.sync.base import Arrays, Reduction, Shape, State, stateless
from jaxlm.sync.group import Group
from jaxlm.sync.packed import pack, row_size, unpack, unpack_parts


def bf16(group: Group) -> Reduction:
    n = group.size

    def scatter(x_NC: jax.Array) -> jax.Array:
        return jnp.sum(_float(group.exchange(_bits(x_NC))), axis=0) / n

    def mean(arrays: Arrays, states: list[State]) -> tuple[Arrays, list[State]]:
        mean_NC = _float(group.gather(_bits(scatter(pack(arrays, n)))))
        return unpack(mean_NC, [x.shape for x in arrays]), states

    def mean_parts(arrays: Arrays, states: list[State]) -> tuple[Arrays, list[State]]:
        return unpack_parts(scatter(pack(arrays, n)), [x.shape for x in arrays], n), states

    def sent_bytes(shapes: Sequence[Shape], parts: bool) -> float:
        return (1 if parts else 2) * (n - 1) * 2 * row_size(shapes, n)

    return Reduction(stateless, mean, mean_parts, sent_bytes)


def _bits(x: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type(x.astype(jnp.bfloat16), jnp.uint16)


def _float(bits: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type(bits, jnp.bfloat16).astype(jnp.float32)
