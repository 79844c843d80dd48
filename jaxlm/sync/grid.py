"""The flat device axis, read as a grid: data x pipeline x context x tensor.

Device i of a grid of sizes (d, p, c, t) is the i-th cell in that order, the last direction first. So the devices of a
tensor group, which exchange most, are neighbours with the fastest links, and data groups reach across hosts. Every
collective runs over the groups of one or more directions: devices that differ in nothing else.

Devices that hold the same parameters differ in data and context. They average gradients, and ZeRO shards their state.
"""

import math
from typing import NamedTuple

import jax
import numpy as np

from jaxlm.config import ParallelConfig
from jaxlm.sync.group import Group

DIRECTIONS = ("data", "pipeline", "context", "tensor")
COPIES = ("data", "context")  # directions in which parameters are the same


class Grid(NamedTuple):
    axis: str  # of the mapped step
    sizes: tuple[int, int, int, int]  # in the order of DIRECTIONS
    platform: str = ""  # of the devices, cpu or gpu; "" = JAX's default

    @property
    def count(self) -> int:
        return math.prod(self.sizes)

    def size(self, *directions: str) -> int:
        return math.prod(self.sizes[DIRECTIONS.index(d)] for d in directions)

    def group(self, *directions: str) -> Group:
        """Groups of devices that differ only in these directions."""
        along = [DIRECTIONS.index(d) for d in directions]
        others = [i for i in range(len(DIRECTIONS)) if i not in along]
        indices = np.arange(self.count).reshape(self.sizes).transpose(*others, *along)
        members = indices.reshape(-1, self.size(*directions)).tolist()
        single = members == [list(range(self.count))]
        return Group(self.axis, len(members[0]), None if single else tuple(map(tuple, members)), self.platform)

    @property
    def everyone(self) -> Group:
        return self.group(*DIRECTIONS)

    @property
    def copies(self) -> Group:
        """Devices that hold the same parameters."""
        return self.group(*COPIES)

    @property
    def splits_model(self) -> bool:
        """Whether devices hold different parts of the model."""
        return self.size("pipeline", "tensor") > 1

    def replica(self) -> jax.Array:
        """Which rows of the batch this device works on: 0 ... size("data") - 1."""
        index = jax.lax.axis_index(self.axis)
        return index if self.size("data") == self.count else index // self.size(*DIRECTIONS[1:])


def make_grid(config: ParallelConfig, axis: str, count: int, platform: str = "") -> Grid:
    """The grid of `count` devices; data takes what the other directions leave."""
    assert count % config.of_a_replica == 0, (count, config)
    sizes = count // config.of_a_replica, config.pipeline, config.context, config.tensor
    return Grid(axis, sizes, platform)
