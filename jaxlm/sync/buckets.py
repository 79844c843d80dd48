"""Buckets: what is moved at once. Arrays are cut between layers and joined, up to a limit of bytes."""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxlm.sync.base import Arrays, Shape


class LayerRange(NamedTuple):
    """Some layers of an array."""

    array: int  # its index
    layers: slice  # along its first dimension


def plan(shapes: Sequence[Shape], limit: int | None) -> list[list[LayerRange]]:
    """Buckets of float32 arrays `[l, ...]`, in order. Each holds at most `limit` bytes, or a single layer that is
    larger; None = one bucket.
    """
    if limit is None:
        return [[LayerRange(i, slice(0, shape[0])) for i, shape in enumerate(shapes)]]
    buckets: list[list[LayerRange]] = [[]]
    room = limit
    for i, shape in enumerate(shapes):
        tensor, done = 4 * math.prod(shape[1:]), 0
        while done < shape[0]:
            fit = min(room // tensor, shape[0] - done)
            if fit <= 0 and buckets[-1]:
                buckets.append([])
                room = limit
                continue
            fit = max(fit, 1)
            buckets[-1].append(LayerRange(i, slice(done, done + fit)))
            done, room = done + fit, room - fit * tensor
    return buckets


def piece_shapes(bucket: list[LayerRange], shapes: Sequence[Shape]) -> list[Shape]:
    return [(p.layers.stop - p.layers.start, *shapes[p.array][1:]) for p in bucket]


def in_buckets(
    act: Callable[[Arrays, list[Any]], tuple[Arrays, list[Any]]],
    arrays: Arrays,
    states: list[Any],
    shapes: Sequence[Shape],
    limit: int | None,
) -> tuple[Arrays, list[Any]]:
    """Applies `act` to one bucket after the other. Arrays and the leaves of their states are [l, ...], and stay so.

    Args:
      shapes: of the arrays as they are moved, for the sizes of the buckets.
    """
    got: list[list[Any]] = [[] for _ in arrays]
    for bucket in plan(shapes, limit):
        pieces = [jax.tree.map(lambda x, p=p: x[p.layers], (arrays[p.array], states[p.array])) for p in bucket]
        acted = zip(*act([a for a, _ in pieces], [s for _, s in pieces]), strict=True)
        for piece, result in zip(bucket, acted, strict=True):
            got[piece.array].append(result)
    joined = [parts[0] if len(parts) == 1 else jax.tree.map(lambda *x: jnp.concatenate(x), *parts) for parts in got]
    return [a for a, _ in joined], [s for _, s in joined]
