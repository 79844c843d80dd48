"""Puts rows of different lengths into batches over all devices, with few shapes, so that few programs are compiled."""

from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxlm.config import ModelConfig

TOKENS = 4096  # of a batch on one device, if no number of rows is asked for
SHORTEST = 16  # least length that rows are padded to


class Devices:
    """The devices that share the rows, each with a copy of the parameters."""

    def __init__(self, params: Any):
        self._devices = jax.local_devices()
        everywhere = NamedSharding(Mesh(np.array(self._devices), ("devices",)), PartitionSpec())
        self.params = jax.device_put(params, everywhere)

    def program(self, function: Callable[..., Any], in_axes: tuple[int | None, ...], donate: tuple[int, ...] = ()):
        """Compiles a function of one device for all of them. Arguments of axis 0 have a row for each device."""
        return jax.pmap(function, in_axes=in_axes, devices=self._devices, donate_argnums=donate)

    def split(self, rows: np.ndarray) -> np.ndarray:
        """`[G * B, ...]` as `[G, B, ...]`, for G devices."""
        return rows.reshape(len(self._devices), -1, *rows.shape[1:])

    def batches(
        self, shapes: Sequence[Hashable], length: Callable[[Any], int], rows: int | None
    ) -> Iterator[tuple[Any, list[int], int]]:
        """Yields (shape, the indices that have this shape, number of rows): batches of as many rows, of which those
        after the indices are empty. The longest come first, so that memory that does not suffice shows at once.

        Args:
          shapes: of each index; those of the same shape share batches.
          length: of the rows of a shape.
          rows: of a batch over all devices; None = as many as have TOKENS tokens on each device.
        """
        count = len(self._devices)
        for shape in sorted(set(shapes), key=length, reverse=True):
            same = [i for i, found in enumerate(shapes) if found == shape]
            most = -(-rows // count) if rows else max(1, TOKENS // length(shape))
            size = count * min(most, power_of_two(-(-len(same) // count)))
            for start in range(0, len(same), size):
                yield shape, same[start : start + size], size


def power_of_two(n: int) -> int:
    """The least one that is at least n."""
    return 1 << max(n - 1, 0).bit_length()


def padded_length(n: int, longest: int, config: ModelConfig) -> int:
    """The length that a row of n tokens is padded to. LongRoPE turns long texts otherwise than short ones, so that a
    short row stays short.
    """
    limits = [longest, config.rope_original] if config.rope_scaling == "longrope" else [longest]
    return min(max(power_of_two(n), SHORTEST), *(limit for limit in limits if limit >= n))


def filled(rows: Sequence[Sequence[int]], shape: tuple[int, int], fill: int) -> np.ndarray:
    """int32 of this shape: the rows, followed by `fill`."""
    array = np.full(shape, fill, np.int32)
    for i, row in enumerate(rows):
        array[i, : len(row)] = row
    return array
