"""Each source of a mixture has its share at any time, and messages name what is wrong in a mixture."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from configs.base import get_config
from jaxlm.config import UserError, mixture
from jaxlm.config.validate import validate
from jaxlm.data import TrainOrder, prepare
from jaxlm.data.order import Mixed, Rows
from jaxlm.data.tokenizers.base import ByteTokenizer
from tests.corpora import LINES, make_config, open_corpus, text, write
from tests.runs import lines, run

WEIGHTS = st.lists(st.floats(1e-4, 1), min_size=1, max_size=6)


class Counting:
    """An order whose rows hold the number of their source and of their sample."""

    rows_per_epoch = num_eval_rows = 1000

    def __init__(self, number: int):
        self.number = number

    def rows(self, sample: np.ndarray) -> Rows:
        return {"inputs": np.stack([np.full(len(sample), self.number), sample], 1).astype(np.int32)}

    def eval_rows(self, places: np.ndarray) -> Rows:
        return self.rows(places)


def mixed(weights: list[float], seed: int = 0) -> Mixed:
    shares = np.array(weights) / sum(weights)
    return Mixed([Counting(k) for k in range(len(weights))], shares.tolist(), seed)


@given(WEIGHTS, st.integers(0, 2**32 - 1))
@settings(deadline=None)
def test_each_source_has_its_share_at_any_time_and_none_of_its_samples_twice(weights: list[float], seed: int):
    order, n = mixed(weights, seed), 700
    sources, places = order.rows(np.arange(n))["inputs"].T
    for k, share in enumerate(np.array(weights) / sum(weights)):
        mine = np.flatnonzero(sources == k)
        np.testing.assert_array_equal(places[mine], np.arange(len(mine)))
        had = np.cumsum(sources == k)
        assert np.abs(had - share * np.arange(1, n + 1)).max() <= len(weights)
    for step in (0, 1, 350, n):
        assert order.counts_before(step) == [int((sources[:step] == k).sum()) for k in range(len(weights))]


def test_a_sample_comes_from_a_source_with_the_probability_of_its_weight():
    weights = [0.61, 0.08, 0.31]
    first = np.array([mixed(weights, seed).source_and_index(np.arange(3, 5))[0] for seed in range(4000)])
    for k, share in enumerate(weights):
        found = (first == k).mean(0)
        assert np.abs(found - share).max() < 4 * np.sqrt(share * (1 - share) / 4000)


def test_shares_hold_for_samples_far_away():
    order = mixed([0.7, 0.2999, 0.0001])
    far = 10**9 * 4096
    source, place = order.source_and_index(np.arange(far, far + 200_000))
    taken = order.counts_before(far)
    for k, share in enumerate([0.7, 0.2999, 0.0001]):
        assert taken[k] == pytest.approx(share * far, rel=1e-5)
        mine = place[source == k]
        np.testing.assert_array_equal(mine, np.arange(taken[k], taken[k] + len(mine)))
        assert len(mine) == pytest.approx(share * 200_000, abs=3)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    files: dict[str, str | bytes] = {
        "a/1.txt": LINES,
        "a/2.txt": LINES.upper(),
        "b.jsonl": "".join(json.dumps({"text": f"record {i}: ÄÖÜ\n" * 4}) + "\n" for i in range(60)),
    }
    return write(tmp_path, files)


def test_a_mixture_joins_its_sources_and_draws_by_weight(folder: Path, tmp_path: Path):
    config = make_config(tmp_path)
    config.data.val_fraction, config.batch_size = 0.1, 8
    parts = {"a": open_corpus(config, folder / "a"), "b": open_corpus(config, folder / "b.jsonl", source="jsonl")}
    config.data.path, config.data.mixture = "", f"3 text {folder / 'a'}; 1 jsonl {folder / 'b.jsonl'}"
    corpus = prepare(validate(config), progress=False)
    assert [share.weight for share in corpus.shares] == [0.75, 0.25]
    for split in ("train", "val"):
        assert text(corpus, split) == text(parts["a"], split) + text(parts["b"], split)
        assert corpus.facts[split]["bytes"] == sum(p.facts[split]["bytes"] for p in parts.values())
        assert len(getattr(corpus, split).starts) == corpus.facts[split]["documents"]
    order = TrainOrder(corpus, config)
    assert corpus.tokenizer
    rows = order.batches(0, 100)["inputs"].reshape(800, 16)
    decoded = [corpus.tokenizer.decode(row) for row in rows]
    of_b = sum("line" not in s.lower() and any(w in s for w in ("rec", "Ä", "Ö", "Ü", "ord")) for s in decoded)
    assert 150 < of_b < 230  # of 800 rows of 16 bytes
    had = order.consumed(100)
    assert [h.tokens for h in had] == [600 * 16, 200 * 16]
    assert had[1].epochs == pytest.approx(200 * 16 / (len(parts["b"].train) - 1), rel=0.01)
    assert prepare(config, progress=False).fingerprint == corpus.fingerprint


def test_all_sources_share_one_tokenizer(folder: Path, tmp_path: Path):
    config = make_config(tmp_path)
    config.data.tokenizer, config.data.vocab_size, config.data.val_fraction = "chars", 300, 0.1
    config.data.mixture = f"1 text {folder / 'a'}; 1 jsonl {folder / 'b.jsonl'}"
    corpus = prepare(validate(config), progress=False)
    assert corpus.tokenizer and {"Ä", "q", "Q"} <= {p.decode() for p in corpus.tokenizer.pieces}
    store = corpus.tokenizer
    single = open_corpus(config, folder / "a", mixture="", source="text")
    assert single.folder and single.tokenizer and single.tokenizer.pieces != store.pieces
    config.data.path, config.data.mixture = "", f"1 jsonl {folder / 'b.jsonl'}; 1 tokens {single.folder}"
    with pytest.raises(UserError, match=r"data\.mixture: .* has token ids of another tokenizer"):
        prepare(validate(config), progress=False)
    config.data.tokenizer = "bytes"
    made = open_corpus(config, folder / "a", mixture="", source="text")
    config.data.path, config.data.mixture = "", f"1 jsonl {folder / 'b.jsonl'}; 1 tokens {made.folder}"
    assert prepare(validate(config), progress=False).shares[1].name == f"tokens {made.folder}"


def test_token_ids_without_a_tokenizer_are_refused(folder: Path, tmp_path: Path):
    """Such ids are refused beside text, which has a tokenizer, and beside other ids."""
    config = make_config(tmp_path)
    np.save(tmp_path / "ids.npy", np.array([256, *range(49)] * 100))
    said = (
        r"data\.mixture: .*ids\.npy is token ids without a tokenizer; allowed: data\.tokenizer_path, or a token store"
    )
    config.data.vocab_size = 257  # the same size as the text's vocabulary of bytes
    for other in (f"text {folder / 'a'}", f"tokens {tmp_path / 'ids.npy'}"):
        config.data.mixture = f"1 {other}; 1 tokens {tmp_path / 'ids.npy'}"
        with pytest.raises(UserError, match=said):
            prepare(validate(config), progress=False)
        assert not Path(config.data.cache_dir).exists(), "refused before anything is made"
    (tmp_path / "bytes").mkdir()
    ByteTokenizer().save(tmp_path / "bytes")
    config.data.tokenizer_path = str(tmp_path / "bytes")
    config.data.mixture = f"1 text {folder / 'a'}; 1 tokens {tmp_path / 'ids.npy'}"
    assert len(prepare(validate(config), progress=False).shares) == 2


@pytest.mark.parametrize("source", ["text", "jsonl", "tokens"])
def test_a_missing_path_is_reported_as_a_source_of_the_mixture(tmp_path: Path, source: str):
    config = make_config(tmp_path)
    config.data.mixture = f"1 stdlib; 1 {source} {tmp_path / 'nowhere'}"
    with pytest.raises(UserError, match=r"^a source of data\.mixture is '.*nowhere': no such file or folder"):
        prepare(validate(config), progress=False)


BAD: dict[str, str] = {
    "stdlib": "has 'stdlib'; allowed: WEIGHT SOURCE",
    "0 stdlib": "has '0 stdlib'",
    "-1 stdlib": "has '-1 stdlib'",
    "nan stdlib": "has 'nan stdlib'",
    ";": "has ''; allowed",
    "1 stdlib;; 1 text x": "has ''; allowed",
    "70% stdlib": "has '70% stdlib'; allowed: .* without %",
    "1 stdin x": "has '1 stdin x'; allowed: .* one of stdlib, text",
    "1 text": "has '1 text'; allowed with text: a path",
    "1 stdlib x": "has '1 stdlib x'; allowed with stdlib: no path",
    "1 synthetic": "has '1 synthetic'",
}


@pytest.mark.parametrize("value", BAD)
def test_a_wrong_mixture_is_refused_with_the_wrong_part(value: str):
    config = get_config()
    config.data.mixture = value
    with pytest.raises(UserError, match=r"data\.mixture " + BAD[value]):
        validate(config)


def test_a_mixture_is_split_into_its_parts():
    config = get_config()
    parts = "0.5 stdlib; 2 text my books/*.txt;1.5 tfds lm1b"
    config.data.text_key = "body"
    for config.data.mixture in (parts, f"{parts}; "):
        found = mixture(config.data)
        assert [(w, d.source, d.path, d.tfds_name, d.text_key) for w, d in found] == [
            (0.5, "stdlib", "", "", "body"),
            (2, "text", "my books/*.txt", "", "body"),
            (1.5, "tfds", "", "lm1b", "body"),
        ]


def test_a_run_reports_tokens_and_epochs_of_each_source(folder: Path, tmp_path: Path, capsys: Any):
    keys = {"data.mixture": f"3 text {folder / 'a'}; 1 jsonl {folder / 'b.jsonl'}", "data.tokenizer": "bytes",
            "steps": 4, "data.source": "stdlib", "data.packing": "document", "eval.sample_tokens": 0}  # fmt: skip
    assert run(tmp_path / "run", **keys) == 0
    last = [m for m in lines(tmp_path / "run") if "loss" in m][-1]
    assert last[f"tokens/text {folder / 'a'}"] == 24 * 16 and last[f"tokens/jsonl {folder / 'b.jsonl'}"] == 8 * 16
    assert last[f"epochs/text {folder / 'a'}"] > 0
    assert "0.75 of text" in " ".join(capsys.readouterr().out.split())


def test_a_mixture_may_hold_only_stores_or_one_source_twice(folder: Path, tmp_path: Path):
    config = make_config(tmp_path)
    stores = [open_corpus(config, folder / "a"), open_corpus(config, folder / "b.jsonl", source="jsonl")]
    config.data.tokenizer, config.data.path = "sentencepiece", ""  # the stores bring their tokenizer
    config.data.mixture = "; ".join(f"1 tokens {store.folder}" for store in stores)
    corpus = prepare(validate(config), progress=False)
    assert corpus.tokenizer and len(corpus.train) == sum(len(store.train) for store in stores)
    config.data.tokenizer, twice = "bytes", f"text {folder / 'a'}"
    config.data.mixture = f"1 {twice}; 2 {twice}"
    corpus = prepare(validate(config), progress=False)
    assert [share.name for share in corpus.shares] == [f"{twice} (1)", f"{twice} (2)"]
    first, second = TrainOrder(corpus, config).mixed.parts
    assert (first.rows(np.arange(20))["inputs"] != second.rows(np.arange(20))["inputs"]).any()  # each has its own order


def test_a_file_in_two_sources_is_refused(folder: Path, tmp_path: Path):
    """Each source names files relative to its own folder, so one could train on a file that the other validates on."""
    config = make_config(tmp_path)
    config.data.mixture = f"1 text {folder}; 1 text {folder / 'a'}"
    with pytest.raises(UserError, match=r"data\.mixture: .*1\.txt is in '.*' and in '.*'; allowed: in one"):
        prepare(validate(config), progress=False)


def test_each_source_needs_tokens_for_one_row(folder: Path, tmp_path: Path):
    """A source with fewer tokens is refused, also if its store was made for shorter rows."""
    config = make_config(tmp_path)
    config.data.mixture = f"1 text {folder / 'a'}; 1 jsonl {folder / 'b.jsonl'}"
    prepare(validate(config), progress=False)
    config.seq_len = 5000
    with pytest.raises(
        UserError, match=r"data\.mixture: jsonl .*b\.jsonl: \d+ training tokens; allowed: at least .*5001"
    ):
        prepare(validate(config), progress=False)


def test_a_mixture_replaces_data_source_and_its_keys():
    config = get_config()
    config.data.source, config.data.mixture = "tfds", "1 stdlib"
    validate(config)
    config.data.path = "x"
    with pytest.raises(UserError, match=r"data\.path is 'x'; allowed: none with data\.mixture"):
        validate(config)
    config.data.path, config.data.val_split, config.data.val_fraction = "", "test", 0.0
    with pytest.raises(UserError, match=r"data\.val_fraction is 0"):
        validate(config)
