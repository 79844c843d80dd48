"""Packs arrays into one matrix with a row for each device, and unpacks them.

Device i of N owns part i of every tensor: c = ceil(size / N) consecutive numbers, padded with zeros at the end. The
parts of l stacked tensors are [l, c]: layers are cut separately, so that a part is the same whether layers are reduced
one by one or all at once. Shapes: N devices, C numbers of a row.
"""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from jaxlm.sync.base import Arrays, Shape


def part_shape(shape: Shape, n: int) -> Shape:
    """[l, ...] -> [l, c]"""
    return shape[0], -(-math.prod(shape[1:]) // n)


def split(x: jax.Array, n: int) -> jax.Array:
    """The parts of all devices, [l, ...] -> [n, l, c]."""
    l, c = part_shape(x.shape, n)
    flat = x.reshape(l, -1)
    flat = jnp.pad(flat, ((0, 0), (0, n * c - flat.shape[1])))
    return flat.reshape(l, n, c).swapaxes(0, 1)


def join(parts: jax.Array, shape: Shape) -> jax.Array:
    """The inverse of `split`, [n, l, c] -> shape."""
    n, l, c = parts.shape
    return parts.swapaxes(0, 1).reshape(l, n * c)[:, : math.prod(shape[1:])].reshape(shape)


def row_size(shapes: Sequence[Shape], n: int, block: int = 1) -> int:
    """C of `pack`."""
    size = sum(math.prod(part_shape(s, n)) for s in shapes)
    return -(-size // block) * block


def pack(arrays: Arrays, n: int, block: int = 1) -> jax.Array:
    """[n, C]: row i holds the parts of device i; C is padded to a multiple of `block`."""
    x_NC = jnp.concatenate([split(x, n).reshape(n, -1) for x in arrays], axis=1)
    return jnp.pad(x_NC, ((0, 0), (0, -x_NC.shape[1] % block)))


def unpack(x_NC: jax.Array, shapes: Sequence[Shape]) -> Arrays:
    """The inverse of `pack`."""
    arrays, at = [], 0
    for shape in shapes:
        l, c = part_shape(shape, x_NC.shape[0])
        arrays.append(join(x_NC[:, at : at + l * c].reshape(-1, l, c), shape))
        at += l * c
    return arrays


def unpack_parts(x_C: jax.Array, shapes: Sequence[Shape], n: int) -> Arrays:
    """The parts [l, c] in one row of a packed matrix."""
    parts, at = [], 0
    for shape in shapes:
        l, c = part_shape(shape, n)
        parts.append(x_C[at : at + l * c].reshape(l, c))
        at += l * c
    return parts
