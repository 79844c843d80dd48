"""Batch N holds the same tokens, however it is requested."""

import dataclasses
import itertools
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from configs.base import get_config
from jaxlm.config import Config, UserError
from jaxlm.data import Corpus, Share, TrainOrder, train_stream
from jaxlm.data import stream as stream_lib
from jaxlm.data.order import VERSION, VERSIONS, num_windows, window_starts
from jaxlm.data.permutation import ROUNDS, permute
from jaxlm.data.stream import TrainStream
from jaxlm.data.tokens import Tokens
from tests.corpora import corpus_of


def make_config(**keys: int) -> Config:
    config = get_config()
    for key, value in {"seq_len": 8, "batch_size": 12, "steps": 40, **keys}.items():
        setattr(config, key, value)
    return config


def make_corpus(num_tokens: int) -> Corpus:
    return corpus_of(np.arange(num_tokens, dtype=np.uint32))  # each id is its own position


def batch_at(corpus: Corpus, config: Config, n: int) -> dict[str, np.ndarray]:
    return {name: batches[0] for name, batches in TrainOrder(corpus, config).batches(n, 1).items()}


def keys(seed: int) -> np.ndarray:
    return np.random.SeedSequence(seed).generate_state(ROUNDS, np.uint64)


# The order


@given(st.integers(1, 5000), st.integers(0, 2**32))
@settings(deadline=None)
def test_permutation_is_a_bijection(size: int, seed: int):
    np.testing.assert_array_equal(np.sort(permute(np.arange(size), size, keys(seed))), np.arange(size))


def test_permutation_of_a_huge_range_is_fast_and_one_to_one():
    size, begin = 10**13 + 7, time.monotonic()
    places = permute(np.arange(size - 100_000, size), size, keys(0))
    assert time.monotonic() - begin < 2
    assert len(np.unique(places)) == 100_000 and places.min() >= 0 and places.max() < size


@pytest.mark.parametrize("size", [5, 97, 1000])
def test_permutations_look_random(size: int):
    """The place of an element is uniform over keys, and neighbors do not stay neighbors."""
    many = np.stack([permute(np.arange(size), size, keys(seed)) for seed in range(500)])
    spread = many[:, 0].std() / np.sqrt((size**2 - 1) / 12)  # 1 for a uniform distribution
    assert 0.85 < spread < 1.15
    assert (np.abs(np.diff(many, axis=1)) == 1).mean() < 3 / size + 0.02 * (size > 5) + 0.2 * (size == 5)
    assert len(np.unique(many, axis=0)) > 75  # of 5! = 120


@given(st.integers(2, 400), st.integers(1, 20), st.integers(-3, 3), st.integers(0, 4), st.sampled_from(VERSIONS))
@settings(deadline=None)
def test_an_epoch_holds_each_window_once(num_tokens: int, seq_len: int, seed: int, epoch: int, version: int):
    if num_tokens <= seq_len:  # such a corpus is refused earlier
        return
    windows = num_windows(num_tokens, seq_len, version)
    sample = np.arange(epoch * windows, (epoch + 1) * windows)
    starts = np.sort(window_starts(sample, num_tokens, seq_len, seed, version))
    np.testing.assert_array_equal(np.diff(starts), seq_len)  # side by side: no target twice
    assert starts[0] >= 0 and starts[-1] + seq_len + 1 <= num_tokens
    left_over = num_tokens - 1 - windows * seq_len
    assert 0 <= left_over < (seq_len if version == 1 else max(2 * seq_len - 1, 1))


def epoch_of(e: int, num_tokens: int, T: int, seed: int = 0, version: int = VERSION) -> list[int]:
    windows = num_windows(num_tokens, T, version)
    return window_starts(np.arange(e * windows, (e + 1) * windows), num_tokens, T, seed, version).tolist()


@pytest.mark.parametrize("num_tokens", range(993, 1002))
def test_windows_differ_from_epoch_to_epoch(num_tokens: int):
    """For any number of left-over tokens, the first window starts at each of T places, and all targets are seen."""
    epochs = [epoch_of(e, num_tokens, 8) for e in range(200)]
    cuts = {min(starts) for starts in epochs}
    assert len(cuts) >= 8 and {cut % 8 for cut in cuts} == set(range(8))
    assert {start + i for starts in epochs for start in starts for i in range(8)} == set(range(num_tokens - 1))
    cut = [min(starts) for starts in epochs[:20]]
    assert cut != [min(epoch_of(e, num_tokens, 8, seed=1)) for e in range(20)]


def test_epochs_and_seeds_differ():
    orders = [tuple(epoch_of(e, 1000, 8, seed)) for e in range(4) for seed in range(4)]
    assert len(set(orders)) == 16


def test_the_order_of_samples_never_changes():
    """If the order changed, old runs could not be repeated. When it must change, add a new version for new runs, with
    its numbers here. A run resumes with the version that it began with.
    """
    golden = {
        1: [771, 675, 715, 459, 457, 465, 385, 489, 777, 105],
        2: [774, 678, 718, 462, 460, 468, 388, 492, 780, 108],
    }
    for version in VERSIONS:
        starts = window_starts(np.arange(120, 130), 1000 + version - 1, 8, seed=0, version=version)
        assert starts.tolist() == golden[version]


# Batches


def test_a_batch_holds_windows_of_the_corpus():
    config, corpus = make_config(), make_corpus(500)
    for n in (0, 4, 5, 10**9):
        batch = batch_at(corpus, config, n)
        assert {k: (v.shape, v.dtype.name) for k, v in batch.items()} == {
            "inputs": ((12, 8), "int32"),
            "targets": ((12, 8), "int32"),
        }
        np.testing.assert_array_equal(np.diff(batch["inputs"]), 1)
        np.testing.assert_array_equal(batch["targets"], batch["inputs"] + 1)


def test_each_epoch_holds_every_target_once_across_batches():
    config, corpus = make_config(batch_size=7), make_corpus(500)
    windows = num_windows(500, 8)
    seen = np.concatenate([batch_at(corpus, config, n)["targets"] for n in range(-(-3 * windows // 7))])
    for epoch in range(3):
        targets = seen[epoch * windows : (epoch + 1) * windows].ravel()
        assert len(np.unique(targets)) == windows * 8 == len(targets)


def test_a_batch_may_have_more_rows_than_windows():
    batch = batch_at(make_corpus(20), make_config(batch_size=64), 3)
    assert batch["inputs"].shape == (64, 8)


def test_far_away_batches_are_made_quickly():
    config, corpus = make_config(batch_size=64), make_corpus(100_000)
    begin = time.monotonic()
    for n in range(10**9, 10**9 + 20):
        batch_at(corpus, config, n)
    assert time.monotonic() - begin < 1


@pytest.mark.parametrize("backend", ["auto", "tf", "thread"])
@pytest.mark.parametrize(("processes", "devices"), [(1, 1), (1, 4), (2, 3), (3, 2)])
def test_batches_do_not_depend_on_the_split(backend, processes: int, devices: int):
    config, corpus = make_config(steps=30), make_corpus(500)
    order = TrainOrder(corpus, config)
    streams = [
        train_stream(order, config, 25, share=Share(devices, p, processes), backend=backend) for p in range(processes)
    ]
    count = 0
    for n, parts in enumerate(zip(*streams, strict=True), start=25):
        whole = batch_at(corpus, config, n)
        for name in whole:
            assert all(part[name].shape == (devices, 12 // processes // devices, 8) for part in parts)
            together = np.concatenate([part[name].reshape(-1, 8) for part in parts])
            np.testing.assert_array_equal(together, whole[name])
            assert together.dtype == whole[name].dtype
        count += 1
    assert count == 5


def test_auto_switches_backends_without_losing_or_repeating_a_batch(monkeypatch):
    monkeypatch.setattr(stream_lib, "PATIENCE", 3)
    config, corpus = make_config(steps=200), make_corpus(500)
    stream = train_stream(TrainOrder(corpus, config), config, 0, share=Share(1))
    moved = 0
    for n, batch in enumerate(stream):
        np.testing.assert_array_equal(batch["inputs"][0], batch_at(corpus, config, n)["inputs"])
        if n == 4:
            stream.settle()
        moved += stream._ahead is not None
    assert n == 199 and moved > 150


def test_auto_works_without_tensorflow(monkeypatch):
    def absent():
        raise ImportError("no tensorflow")

    monkeypatch.setattr(stream_lib, "import_tensorflow", absent)
    monkeypatch.setattr(stream_lib, "PATIENCE", 3)
    config, corpus = make_config(steps=50), make_corpus(500)
    stream = train_stream(TrainOrder(corpus, config), config, 0, share=Share(1))
    first = [next(stream) for _ in range(10)]
    stream.settle()
    rest = list(stream)
    for n, batch in enumerate(first + rest):
        np.testing.assert_array_equal(batch["inputs"][0], batch_at(corpus, config, n)["inputs"])
    with pytest.raises(ImportError):
        train_stream(TrainOrder(corpus, config), config, 0, share=Share(1), backend="tf")


def test_close_does_not_wait_for_tensorflow(monkeypatch: pytest.MonkeyPatch):
    """A run may be stopped in its first seconds, during the import."""
    imported = threading.Event()
    monkeypatch.setattr(stream_lib, "import_tensorflow", imported.wait)
    monkeypatch.setattr(stream_lib, "PATIENCE", 3)
    config, corpus = make_config(steps=50), make_corpus(500)
    stream = train_stream(TrainOrder(corpus, config), config, 0, share=Share(1))
    for _ in range(10):
        next(stream)
    assert stream._importer.is_alive()
    closing = threading.Thread(target=stream.close)
    closing.start()
    closing.join(timeout=20)
    assert not closing.is_alive()
    imported.set()
    stream.settle()
    with pytest.raises(StopIteration):
        next(stream)


@pytest.mark.parametrize("backend", ["auto", "tf", "thread"])
def test_errors_are_raised_not_swallowed(backend: str):
    def make(first: int, count: int) -> dict[str, np.ndarray]:
        if first <= 7 < first + count:
            raise UserError("the disk is gone")
        return {"inputs": np.arange(first, first + count, dtype=np.int32).reshape(count, 1, 1, 1)}

    stream = TrainStream(make, 0, 100, backend)
    assert [int(next(stream)["inputs"][0, 0, 0]) for _ in range(7)] == list(range(7))
    with pytest.raises(UserError, match="the disk is gone"):
        next(stream)
    stream.close()


@pytest.mark.parametrize("backend", ["auto", "tf", "thread"])
def test_close_ends_the_background_work(backend):
    config, corpus = make_config(steps=10**9), make_corpus(500)
    before = threading.active_count()
    stream = train_stream(TrainOrder(corpus, config), config, 10**8, share=Share(1), backend=backend)
    list(itertools.islice(stream, 3))
    stream.close()
    stream.close()
    assert next(stream, None) is None
    assert threading.active_count() <= before + (backend == "tf")  # tf.data keeps Python threads for its own pool


@pytest.mark.parametrize("backend", ["tf", "thread"])
def test_batches_are_made_ahead(backend):
    made = []

    def make(first: int, count: int) -> dict[str, np.ndarray]:
        made.extend(range(first, first + count))
        return {"inputs": np.zeros((count, 1, 1, 2), np.int32)}

    stream = TrainStream(make, 0, 100, backend)
    next(stream)
    deadline = time.monotonic() + 10
    while max(made) < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert 3 <= max(made) < 4 * stream_lib.BLOCK
    stream.close()


def test_tensorflow_does_not_convert_the_code_of_batches(monkeypatch: pytest.MonkeyPatch):
    """AutoGraph would write converted code to a temporary file, and a signal would leave the file behind."""
    tf, found = pytest.importorskip("tensorflow"), []
    function = tf.numpy_function

    def traced(*args: Any) -> Any:
        found.append(tf.__internal__.autograph.control_status_ctx().status.name)
        return function(*args)

    monkeypatch.setattr(tf, "numpy_function", traced)
    stream = TrainStream(lambda first, count: {"inputs": np.zeros((count, 1, 1, 2), np.int32)}, 0, 100, "tf")
    next(stream)
    stream.close()
    assert found == ["DISABLED"]


@pytest.mark.parametrize(("processes", "devices", "each"), [(1, 4, 2), (2, 2, 4), (2, 6, 4), (3, 2, 2), (4, 1, 2)])
def test_devices_of_a_replica_get_the_same_rows(processes: int, devices: int, each: int):
    """Also where a replica is on two hosts, or a host has a part of two."""
    config, corpus = make_config(steps=1), make_corpus(500)
    whole, replicas = batch_at(corpus, config, 0)["inputs"], processes * devices // each
    found = []
    for p in range(processes):
        share = Share(devices, p, processes, of_a_replica=each)
        found += list(next(train_stream(TrainOrder(corpus, config), config, 0, share))["inputs"])
    want = whole.reshape(replicas, 1, -1, 8).repeat(each, axis=1).reshape(replicas * each, -1, 8)
    np.testing.assert_array_equal(found, want)


def test_a_batch_size_that_devices_do_not_divide_is_refused():
    with pytest.raises(UserError, match="batch_size is 12; allowed: a multiple of 5 devices x 1 hosts"):
        train_stream(TrainOrder(make_corpus(500), make_config()), make_config(), 0, share=Share(5))


def test_memory_mapped_corpora_give_the_same_batches(tmp_path: Path):
    np.arange(500, dtype="<u2").tofile(tmp_path / "a.bin")
    corpus = dataclasses.replace(make_corpus(500), train=Tokens([np.memmap(tmp_path / "a.bin", "<u2", mode="r")]))
    config = make_config(steps=3)
    for batch, n in zip(train_stream(TrainOrder(corpus, config), config, 0, share=Share(2)), range(3), strict=True):
        inputs = batch["inputs"].reshape(12, 8)
        np.testing.assert_array_equal(inputs, batch_at(make_corpus(500), config, n)["inputs"])
        assert not isinstance(inputs, np.memmap)
