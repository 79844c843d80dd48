"""Token ids in many shards are read as one array."""

import os
import resource
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxlm.config import UserError
from jaxlm.config.files import load
from jaxlm.data import open_store, prepare
from jaxlm.data.sources import files as files_lib
from jaxlm.data.tokens import Tokens, chain
from jaxlm.host.exit_codes import exit_code
from jaxlm.run import metrics
from tests.corpora import make_config, open_corpus, write
from tests.runs import CONFIG, run

SIZES = st.lists(st.lists(st.integers(0, 12), min_size=1, max_size=5), min_size=1, max_size=4)


@given(SIZES, st.integers(1, 15), st.data())
@settings(deadline=None)
def test_shards_and_chains_are_one_array(sizes: list[list[int]], length: int, data: st.DataObject):
    """The chained sources have masks or not, and each knows where its documents start."""
    rng = np.random.default_rng(sum(map(sum, sizes)))
    parts, ids, masks, starts = [], [np.empty(0, int)], [np.empty(0, bool)], []
    for shards in sizes:
        own = [rng.integers(1, 1000, n).astype(np.uint16) for n in shards]
        mask = [rng.random(n) < 0.5 for n in shards]
        masked = data.draw(st.booleans())
        places = np.flatnonzero(rng.random(sum(shards)) < 0.3)
        parts.append(Tokens(own, mask if masked else None, lambda places=places: places, end=7))
        starts += (places + sum(map(len, ids))).tolist()
        ids += own
        masks += mask if masked else [np.ones(n, bool) for n in shards]
    whole, learned, tokens = np.concatenate(ids), np.concatenate(masks), chain(parts)
    np.testing.assert_array_equal(np.asarray(tokens), whole)
    assert len(tokens) == len(whole) and tokens.starts is not None and tokens.starts.tolist() == starts
    first = np.arange(max(len(whole) - length + 1, 0))
    if len(first):
        windows = np.lib.stride_tricks.sliding_window_view(whole, length)
        allowed = np.lib.stride_tricks.sliding_window_view(learned, length)
        np.testing.assert_array_equal(tokens.windows(first, length), windows)
        np.testing.assert_array_equal(tokens.targets(first, length), np.where(allowed, windows, -1))
    after = np.where([*learned[1:], True], [*whole[1:], 7], -1)
    for start in first.tolist():
        x, y = np.zeros((2, length), np.int32)
        tokens.copy(start, x, y)
        np.testing.assert_array_equal(x, whole[start : start + length])
        np.testing.assert_array_equal(y, after[start : start + length])
    a, b = sorted(data.draw(st.tuples(*[st.integers(0, len(whole))] * 2)))
    np.testing.assert_array_equal(np.concatenate([np.empty(0, int), *tokens.parts(a, b)]), whole[a:b])


def test_many_shards_open_with_few_open_files(tmp_path: Path, monkeypatch):
    """The soft limit of open files, 1024 on many machines, does not limit the number of shards."""
    monkeypatch.setattr(files_lib, "UNIT_BYTES", 100)
    config = make_config(tmp_path)
    path = write(tmp_path, {"a.txt": "".join(f"line {i} of a text\n" for i in range(900))}) / "a.txt"
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (100, hard))
    try:
        corpus = open_corpus(config, path)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert corpus.folder and len(corpus.train.shards) > 100 and len(corpus.train) > 10_000
    assert open_store(corpus.folder, verify=True).fingerprint == corpus.fingerprint


@pytest.mark.parametrize("suffix", [".bin", ".npy"])
def test_a_file_that_is_cut_short_while_it_is_open_is_named(suffix: str, tmp_path: Path):
    """Reading the file raises an error; if it were mapped into memory, reading would kill the process."""
    config, path = load(CONFIG, []), tmp_path / f"ids{suffix}"
    ids = np.random.default_rng(0).integers(0, 64, 200_000).astype("<u2")
    ids.tofile(path) if suffix == ".bin" else np.save(path, ids)
    config.data.source, config.data.path, config.data.vocab_size = "tokens", str(path), 64
    corpus = prepare(config)
    starts = np.arange(0, 150_000, 777)
    want = np.stack([ids[a : a + 65] for a in starts])
    np.testing.assert_array_equal(corpus.train.windows(starts, 65), want)
    os.truncate(path, 100_000)
    np.testing.assert_array_equal(corpus.train.windows(starts[:20], 65), want[:20])
    with pytest.raises(UserError, match=f"ids{suffix}: 100000 bytes; allowed: 3"):
        corpus.train.windows(starts, 65)
    with pytest.raises(UserError, match=f"ids{suffix}: 100000 bytes; allowed: 400"):
        np.asarray(corpus.val)


def test_a_run_whose_token_file_is_cut_short_ends_with_2(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any):
    path = tmp_path / "ids.bin"
    np.random.default_rng(0).integers(0, 64, 200_000).astype("<u2").tofile(path)
    report = metrics.Log.__call__

    def cut(self: metrics.Log, m: dict[str, Any]) -> None:
        os.truncate(path, 1000)
        report(self, m)

    monkeypatch.setattr(metrics.Log, "__call__", cut)
    keys = {"steps": 500, "data.source": "tokens", "data.path": path, "eval.every_steps": 0, "log.every_steps": 1}
    assert exit_code(lambda: run(tmp_path / "run", **keys)) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"jaxlm: {path}: 1000 bytes; allowed: ") and error.count("\n") == 1
