"""Pipeline schedules as data: which stage works on which micro-batch at which tick.

Each of P stages has v chunks of layers: chunk c of stage p is the (c P + p)-th part of the model. A tick has two
phases, in which a stage may run a chunk forward and then one backward, each for a micro-batch. What it sends, its
neighbour on the ring uses in the next tick. Stages without work in a phase wait for the others.

| parallel.schedule | backward passes begin | kept at once, at most, with one chunk |
| --- | --- | --- |
| gpipe (Huang et al., GPipe, 2019) | after all forward passes | m |
| 1f1b (Narayanan et al., PipeDream, 2019) | as soon as possible | min(m, 2 P - 1) |

With several chunks they are interleaved (Narayanan et al., Efficient Large-Scale Language Model Training on GPU
Clusters Using Megatron-LM, 2021): P micro-batches pass a chunk of all stages, then the next one.

If P divides m, all have m v + P - 1 forward phases with work, as many backward ones, and so the bubble
(P - 1) / (m v + P - 1): the share of their time in which stages have nothing to do. "Kept" are inputs of chunks, from
which backward passes start. 1F1B as published keeps P of them. There a stage's forward pass runs beside its neighbour's
backward pass, which takes at least twice as long; stages that exchange after each would wait for the longer one.
"""

import itertools
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

NONE = -1  # in a table: nothing to do
# {parallel.schedule: (tick after the last forward phase, tick in which the first micro-batch has passed the model) ->
# first tick with a backward phase}
FIRST_BACKWARD: dict[str, Callable[[int, int], int]] = {
    "gpipe": lambda all_done, one_done: all_done,
    "1f1b": lambda all_done, one_done: one_done,
}


class Table(NamedTuple):
    """int32 [ticks, P] each."""

    forward: np.ndarray  # micro-batch that the stage runs forward
    forward_chunk: np.ndarray
    forward_slot: np.ndarray  # where it keeps the chunk's input until the backward pass
    backward: np.ndarray  # micro-batch that it runs backward
    backward_chunk: np.ndarray
    backward_slot: np.ndarray

    @property
    def slots(self) -> int:
        """Inputs that a stage keeps at once, at most."""
        return int(self.forward_slot.max()) + 1

    def losses(self, chunks: int) -> int:
        """The number of ticks in which the last stage runs the last chunk backward, and so computes losses."""
        return int(np.sum((self.backward[:, -1] != NONE) & (self.backward_chunk[:, -1] == chunks - 1)))

    def runs(self) -> "list[Run]":
        """The table, cut where a phase begins or ends to have work, into at most three parts."""
        forward, backward = (np.any(x != NONE, axis=1) for x in (self.forward, self.backward))
        ends = np.flatnonzero(np.diff(forward) | np.diff(backward)) + 1
        between = itertools.pairwise([0, *ends.tolist(), len(forward)])
        return [Run(bool(forward[a]), bool(backward[a]), Table(*(x[a:b] for x in self))) for a, b in between]


class Run(NamedTuple):
    """Consecutive ticks with the same phases."""

    forward: bool
    backward: bool
    ticks: Table


def make_table(schedule: str, stages: int, micro: int, chunks: int = 1) -> Table:
    """The table of a schedule for `micro` micro-batches."""
    P, m, v = stages, micro, chunks

    def ahead(i: int, c: int) -> int:
        return _ahead(P, v, i, c)

    forward_ticks = forward_phases(P, m, v)
    first_backward = FIRST_BACKWARD[schedule](forward_ticks, v * P - 1)
    ticks = first_backward + forward_ticks
    table = Table(*(np.full((ticks, P), NONE, np.int32) for _ in Table._fields))
    for p in range(P):
        works = [(i, c) for i in range(m) for c in range(v)]
        begins = {ahead(i, c) + p: (i, c) for i, c in works}
        ends = {first_backward + ahead(i, v - 1 - c) + P - 1 - p: (i, c) for i, c in works}
        free, kept = [*range(m * v)][::-1], {}
        for tick in range(ticks):
            if (work := begins.get(tick)) is not None:
                kept[work] = free.pop()
                table.forward[tick, p], table.forward_chunk[tick, p] = work
                table.forward_slot[tick, p] = kept[work]
            if (work := ends.get(tick)) is not None:
                table.backward[tick, p], table.backward_chunk[tick, p] = work
                table.backward_slot[tick, p] = kept[work]
                free.append(kept.pop(work))
    return table


def _ahead(P: int, v: int, i: int, c: int) -> int:
    """Ticks until micro-batch i passes the first stage's chunk c: P micro-batches pass a chunk, then the next."""
    return i // P * P * v + c * P + i % P


def forward_phases(stages: int, micro: int, chunks: int = 1) -> int:
    """The number of ticks in which some stage runs a chunk forward; as many have a backward phase."""
    return _ahead(stages, chunks, micro - 1, chunks - 1) + stages


def bubble(stages: int, micro: int, chunks: int = 1) -> float:
    """The share of its time in which a stage has nothing to do."""
    return (stages - 1) / (micro * chunks + stages - 1)


def picture(table: Table) -> str:
    """The table as text: a row for each stage, a column for each tick, and in it the micro-batch that the stage runs
    forward and the one that it runs backward; of several chunks with their letters.
    """

    def work(micro: int, chunk: int, phase: str) -> str:
        letter = "abcdefghijklmnopqrstuvwxyz"[chunk] if table.forward_chunk.max() else ""
        return "" if micro == NONE else f"{phase}{micro}{letter}"

    def cell(tick: int, stage: int) -> str:
        at = tick, stage
        forward = work(table.forward[at], table.forward_chunk[at], "F")
        backward = work(table.backward[at], table.backward_chunk[at], "B")
        width = 2 + bool(table.forward_chunk.max())
        return f"{forward:{width}} {backward:{width}}"

    ticks, stages = table.forward.shape
    rows = [f"stage {p} | " + " | ".join(cell(t, p) for t in range(ticks)) for p in range(stages)]
    return "\n".join(row.rstrip() for row in rows)
