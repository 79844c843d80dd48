"""Pipeline schedules: who waits for whom, what is kept, and how long stages have nothing to do."""

import numpy as np
import pytest

from jaxlm.train.schedule_table import NONE, Table, bubble, forward_phases, make_table

CASES = [
    (schedule, stages, micro, chunks)
    for schedule in ("gpipe", "1f1b")
    for stages, micro, chunks in [
        (1, 3, 1),
        (2, 1, 1),
        (2, 6, 1),
        (4, 8, 1),
        (4, 3, 1),
        (2, 4, 3),
        (4, 8, 2),
        (3, 4, 2),
    ]
]


def works(table: Table, phase: str) -> dict[tuple[int, int, int], int]:
    """{(stage, micro-batch, chunk): tick}"""
    which, chunks = getattr(table, phase), getattr(table, f"{phase}_chunk")
    found = [(int(p), int(which[t, p]), int(chunks[t, p]), int(t)) for t, p in np.argwhere(which != NONE)]
    assert len(found) == len({work[:3] for work in found})
    return {work[:3]: work[3] for work in found}


@pytest.mark.parametrize("schedule, stages, micro, chunks", CASES)
def test_each_stage_does_its_work_when_it_is_there(schedule: str, stages: int, micro: int, chunks: int):
    """What a stage sends in a tick, the next one on the ring uses in the next tick."""
    table = make_table(schedule, stages, micro, chunks)
    forward, backward = works(table, "forward"), works(table, "backward")
    everything = {(p, i, c) for p in range(stages) for i in range(micro) for c in range(chunks)}
    assert forward.keys() == backward.keys() == everything
    for p, i, c in everything:
        after = (p + 1, i, c) if p + 1 < stages else (0, i, c + 1)
        if after in everything:
            assert forward[after] == forward[p, i, c] + 1
            assert backward[after] == backward[p, i, c] - 1
        assert forward[p, i, c] <= backward[p, i, c]  # a tick's forward phase comes first
    if schedule == "gpipe":
        assert max(forward.values()) < min(backward.values())


@pytest.mark.parametrize("schedule, stages, micro, chunks", CASES)
def test_what_is_kept_is_not_overwritten_before_it_is_read(schedule: str, stages: int, micro: int, chunks: int):
    table = make_table(schedule, stages, micro, chunks)
    most = 0
    for p in range(stages):
        kept: dict[int, tuple[int, int]] = {}
        for t in range(len(table.forward)):
            if table.forward[t, p] != NONE:
                assert table.forward_slot[t, p] not in kept
                kept[table.forward_slot[t, p]] = table.forward[t, p], table.forward_chunk[t, p]
            most = max(most, len(kept))
            if table.backward[t, p] != NONE:
                work = table.backward[t, p], table.backward_chunk[t, p]
                assert kept.pop(table.backward_slot[t, p]) == work
        assert not kept
    assert most == table.slots
    if chunks == 1:
        assert most == (micro if schedule == "gpipe" else min(micro, 2 * stages - 1))


@pytest.mark.parametrize("schedule, stages, micro, chunks", [case for case in CASES if case[2] % case[1] == 0])
def test_the_bubble_is_that_of_the_papers(schedule: str, stages: int, micro: int, chunks: int):
    """Of the phases in which any stage works, a stage works in all but the bubble, if stages divide micro-batches."""
    table = make_table(schedule, stages, micro, chunks)
    for phase in (table.forward, table.backward):
        busy = np.any(phase != NONE, axis=1).sum()
        for p in range(stages):
            idle = 1 - np.sum(phase[:, p] != NONE) / busy
            assert idle == pytest.approx(bubble(stages, micro, chunks))
    assert bubble(4, 12) == pytest.approx(3 / 15) and bubble(4, 12, 3) == pytest.approx(3 / 39)


@pytest.mark.parametrize("schedule, stages, micro, chunks", CASES)
def test_runs_of_ticks_have_the_phases_with_work(schedule: str, stages: int, micro: int, chunks: int):
    table = make_table(schedule, stages, micro, chunks)
    runs = table.runs()
    assert len(runs) <= 3
    for whole, *parts in zip(table, *(run.ticks for run in runs), strict=True):
        np.testing.assert_array_equal(np.concatenate(parts), whole)
    for run in runs:
        for there, which in ((run.forward, run.ticks.forward), (run.backward, run.ticks.backward)):
            assert all(there == np.any(row != NONE) for row in which)
    assert sum(run.ticks.losses(chunks) for run in runs) == micro  # each micro-batch has its losses once
    for phase in (table.forward, table.backward):
        assert forward_phases(stages, micro, chunks) == np.any(phase != NONE, axis=1).sum()
