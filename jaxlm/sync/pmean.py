"""The mean by an all-reduce, or by a reduce-scatter for parts; on GPUs, XLA lowers both to NCCL.

Bytes: each of N devices sends 2 (N - 1) / N times the bytes of the gradients in a ring all-reduce, half of that in a
reduce-scatter. Exact up to rounding; only parts are padded.
"""

import math
from collections.abc import Sequence

from jaxlm.sync.base import Arrays, Reduction, Shape, State, stateless
from jaxlm.sync.group import Group
from jaxlm.sync.packed import row_size, split


def pmean(group: Group) -> Reduction:
    n = group.size

    def mean(arrays: Arrays, states: list[State]) -> tuple[Arrays, list[State]]:
        return group.mean(arrays), states

    def mean_parts(arrays: Arrays, states: list[State]) -> tuple[Arrays, list[State]]:
        return [x / n for x in group.scatter_sums([split(x, n) for x in arrays])], states

    def sent_bytes(shapes: Sequence[Shape], parts: bool) -> float:
        if parts:
            return 4 * (n - 1) * row_size(shapes, n)
        return 2 * (n - 1) / n * 4 * sum(map(math.prod, shapes))

    return Reduction(stateless, mean, mean_parts, sent_bytes)
