"""The mean by an all-reduce of float16, scaled so that no sum overflows and no number that matters underflows.

float16 reaches from 6e-8 to 65504, and gradients may be far smaller. All devices first agree on the largest number of
each tensor (one small all-reduce). They divide by a power of two, which costs no precision, so that a sum of N numbers
stays below 2^15. Underflow then loses less than N * 2^-38 of the tensor's largest number, or of 2^-110.

Bytes: 2 (N - 1) / N * 2 for each number, half of pmean's, and 2 (N - 1) / N * 4 for each tensor. Error of an element:
at most 2^-11 of the mean of its absolute values for rounding, and as much for each of the N - 1 additions.
"""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.sync.base import Arrays, Reduction, Shape, State, magnitudes, stateless
from jaxlm.sync.group import Group
from jaxlm.sync.packed import pack, row_size, unpack_parts


def fp16(group: Group) -> Reduction:
    n = group.size
    room = 2.0 ** ((n - 1).bit_length() - 15)  # at least N / 2^15

    def scales(arrays: Arrays) -> Arrays:
        """A power of two for each tensor, [l]: the largest number of all devices, rounded up, times `room`."""
        largest_L = group.max(jnp.concatenate([jnp.max(magnitudes(x).reshape(x.shape[0], -1), axis=1) for x in arrays]))
        exponents_L = jnp.frexp(jnp.maximum(largest_L, 2.0**-110))[1]  # no scale is subnormal
        scales_L = jnp.where(jnp.isfinite(largest_L), jnp.ldexp(jnp.float32(room), exponents_L), jnp.nan)
        return jnp.split(scales_L, np.cumsum([x.shape[0] for x in arrays])[:-1].tolist())

    def scaled(arrays: Arrays, factors: Arrays) -> Arrays:
        return [x / _like(f, x) for x, f in zip(arrays, factors, strict=True)]

    def mean(arrays: Arrays, states: list[State]) -> tuple[Arrays, list[State]]:
        factors = scales(arrays)
        sums = group.sum([x.astype(jnp.float16) for x in scaled(arrays, factors)])
        return [s.astype(jnp.float32) * _like(f / n, s) for s, f in zip(sums, factors, strict=True)], states

    def mean_parts(arrays: Arrays, states: list[State]) -> tuple[Arrays, list[State]]:
        factors = scales(arrays)
        own_C = group.scatter_sum(pack(scaled(arrays, factors), n).astype(jnp.float16)).astype(jnp.float32)
        parts = unpack_parts(own_C, [x.shape for x in arrays], n)
        return [p * _like(f / n, p) for p, f in zip(parts, factors, strict=True)], states

    def sent_bytes(shapes: Sequence[Shape], parts: bool) -> float:
        agreed = 2 * (n - 1) / n * 4 * sum(s[0] for s in shapes)
        if parts:
            return agreed + (n - 1) * 2 * row_size(shapes, n)
        return agreed + 2 * (n - 1) / n * 2 * sum(map(math.prod, shapes))

    return Reduction(stateless, mean, mean_parts, sent_bytes)


def _like(scale_L: jax.Array, x: jax.Array) -> jax.Array:
    return scale_L.reshape(-1, *[1] * (x.ndim - 1))
