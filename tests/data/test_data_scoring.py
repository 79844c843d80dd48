"""An evaluation scores the right rows, in the right batches."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxlm.config import UserError
from jaxlm.data import Corpus, Scored, Share, eval_batches
from jaxlm.data.scoring import scored_rows
from tests.corpora import corpus_of
from tests.data.test_data_stream import make_config

SPLITS = st.sampled_from([(1, 1), (1, 2), (2, 2), (3, 1)])  # processes, devices


def counting(*lengths: int) -> Corpus:
    """Returns sources whose ids count up from one source to the next, so that each id tells its position."""
    ends = np.cumsum([100, *lengths])
    return corpus_of(*(np.arange(a, b, dtype=np.uint16) for a, b in itertools.pairwise(ends)))


def targets_of(scored: list[Scored]) -> np.ndarray:
    targets = np.concatenate([s.batch["targets"].ravel() for s in scored])
    return targets[targets != -1]


@given(st.lists(st.integers(2, 200), min_size=1, max_size=3), st.integers(1, 20), st.integers(1, 3), SPLITS)
@settings(deadline=None)
def test_evaluation_covers_every_target_once(lengths: list[int], seq_len: int, per_device: int, split: tuple[int, int]):
    (processes, devices), corpus = split, counting(*lengths)
    rows = per_device * processes * devices
    config = make_config(seq_len=seq_len)
    hosts = [list(eval_batches(corpus, config, rows, share=Share(devices, p, processes))) for p in range(processes)]
    assert len({len(batches) for batches in hosts}) == 1
    targets = []
    for parts in zip(*hosts, strict=True):
        assert len({part.source for part in parts}) == 1 and all(part.weight == 1 for part in parts)
        for part in (part.batch for part in parts):
            assert all(part[k].shape == (devices, per_device, seq_len) for k in ("inputs", "targets"))
            assert part["inputs"].dtype == part["targets"].dtype == np.int32
            counted = part["targets"] != -1
            np.testing.assert_array_equal(part["inputs"][counted] + 1, part["targets"][counted])
            assert not part["inputs"][~counted].any()
            targets.extend(part["targets"][counted])
    firsts = {100, *np.cumsum([100, *lengths])[:-1].tolist()}  # the first id of each source is no target
    assert targets == [i for i in range(100, 100 + sum(lengths)) if i not in firsts]  # in order, over hosts and devices


def test_a_limited_evaluation_is_spread_over_the_whole_set():
    corpus, config = counting(1001), make_config()  # 125 rows of 8
    some = list(eval_batches(corpus, config, 4, share=Share(2), limit=5))
    assert len(some) == 5 and {s.source for s in some} == {""} and {s.weight for s in some} == {125 / 20}
    targets = targets_of(some)
    assert len(targets) == 20 * 8 == len(set(targets.tolist()))
    starts = targets[::8]
    assert starts[0] == 101 and starts[-1] > 101 + 0.94 * 1000
    assert set(np.diff(starts).tolist()) <= {6 * 8, 7 * 8}
    again = list(eval_batches(corpus, config, 4, share=Share(1), limit=5))
    np.testing.assert_array_equal(targets_of(again), targets)
    everything = list(eval_batches(corpus, config, 4, share=Share(2)))
    assert len(everything) == 32
    assert len(list(eval_batches(corpus, config, 4, share=Share(2), limit=99))) == 32
    with pytest.raises(UserError, match="the evaluation batch is 5"):
        eval_batches(corpus, config, 5, share=Share(2))


def test_each_source_of_a_mixture_has_its_share_of_the_batches():
    corpus, config = counting(4801, 1601, 41), make_config()  # 600, 200 and 5 rows
    some = list(eval_batches(corpus, config, 4, share=Share(1), limit=8))
    assert [s.source for s in some] == [*"aaaaaa", *"bb", "c"]
    assert [s.weight for s in some] == [600 / 24] * 6 + [200 / 8] * 2 + [5 / 4]
    assert [(s.batch["targets"] >= 0).sum() for s in some] == [32] * 9
    one = list(eval_batches(corpus, config, 4, share=Share(1), limit=1))
    assert [s.source for s in one] == [*"abc"]


@given(st.lists(st.integers(1, 500), min_size=1, max_size=5), st.integers(1, 16), st.integers(0, 60))
def test_rows_are_distinct_and_about_as_many_as_wanted(counts: list[int], size: int, limit: int):
    picked = scored_rows(counts, size, limit)
    batches = sum(-(-len(rows) // size) for rows in picked)
    assert not limit or batches <= limit + len(counts)
    for rows, count in zip(picked, counts, strict=True):
        assert len(rows) and rows[0] >= 0 and rows[-1] < count and (np.diff(rows) > 0).all()
        if not limit or limit >= sum(-(-n // size) for n in counts):
            assert len(rows) == count
