"""Pairs for an encoder and a decoder: nothing is lost but ends that are too long, and each pair stays together."""

import ast
import itertools
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxlm.config import Config, UserError
from jaxlm.data import Corpus, Share, TrainOrder, eval_batches, num_eval_batches, prepare
from jaxlm.data.inspect import View, pair_facts
from jaxlm.data.order import make_order
from jaxlm.data.pairs import PackedPairs, answers_of, lengths_of, pack_pairs
from jaxlm.data.sources.functions import _functions
from jaxlm.data.sources.records import RecordPart
from jaxlm.data.tokens import Tokens
from tests.corpora import make_config, write

BOS = 99
LENGTHS = st.lists(st.tuples(st.integers(0, 30), st.integers(1, 20)), min_size=1, max_size=60)


def made(lengths: list[tuple[int, int]], shards: int = 1) -> Tokens:
    """Pairs of prompts and answers of these lengths, without bos; ids tell their place."""
    starts = np.cumsum([0, *(1 + sum(pair) for pair in lengths)])
    ids, mask = np.arange(starts[-1], dtype=np.uint32) + 100, np.ones(starts[-1], bool)
    ids[starts[:-1]] = BOS
    for start, (prompt, _) in zip(starts, lengths, strict=False):
        mask[start + 1 : start + 1 + prompt] = False
    cuts = starts[np.linspace(0, len(lengths), shards + 1).astype(int)]
    parts = [[x[a:b] for a, b in itertools.pairwise(cuts)] for x in (ids, mask)]
    return Tokens(parts[0], parts[1], lambda: starts[:-1], BOS)


@given(LENGTHS, st.integers(1, 3), st.integers(4, 40), st.integers(3, 25))
@settings(deadline=None)
def test_each_pair_is_in_one_row_with_its_own_answer(lengths: list[tuple[int, int]], shards: int, S: int, T: int):
    tokens = made(lengths, shards)
    ids = np.asarray(tokens)
    assert tokens.starts is not None
    np.testing.assert_array_equal(answers_of(tokens) - tokens.starts - 1, [prompt for prompt, _ in lengths])
    rows = PackedPairs(tokens, S, T, seed=0)
    assert rows.num_eval_rows <= len(lengths)
    found = rows.eval_rows(np.arange(rows.num_eval_rows + 1))  # the last row is padding
    assert (found["targets"][-1] == -1).all()
    seen = []
    for r in range(rows.num_eval_rows):
        row = {name: x[r] for name, x in found.items()}
        prompts = np.split(row["prompts"], np.flatnonzero(row["prompt_positions"] == 0)[1:])
        starts = [*np.flatnonzero(row["positions"] == 0), T]
        filled = 0
        for k, (a, b) in enumerate(itertools.pairwise(starts)):
            if row["targets"][a] < 0:  # padding, one place at a time
                assert b == a + 1 and row["inputs"][a] == 0
                continue
            start = int(prompts[k][1]) - 101 if len(prompts[k]) > 1 else int(row["targets"][a]) - 101
            place = list(tokens.starts).index(start)
            seen.append(place)
            prompt, answer = lengths[place]
            np.testing.assert_array_equal(prompts[k], ids[start:][: min(1 + prompt, S)])
            whole = np.append(ids[start + 1 + prompt :][:answer], BOS)  # ends with the next document's bos
            np.testing.assert_array_equal(row["targets"][a:b], whole[:T])
            np.testing.assert_array_equal(row["inputs"][a:b], np.append(BOS, whole)[: min(answer + 1, T)])
            np.testing.assert_array_equal(row["positions"][a:b], np.arange(b - a))
            filled += b - a
        assert rows.filled()[r] == filled
    assert sorted(seen) == list(range(len(lengths)))


def test_many_pairs_are_packed_fast_and_tightly():
    rng = np.random.default_rng(0)
    lengths = np.stack([rng.integers(1, 100, 200_000), rng.integers(1, 20, 200_000)], axis=1)
    pairs = pack_pairs(made([(int(a), int(b)) for a, b in lengths]), 128, 32)
    prompts, _ = lengths_of(pairs)
    assert prompts.sum() / (128 * (len(pairs.rows) - 1)) > 0.75  # of what one pair a row would fill: 0.4


def open_pairs(tmp_path: Path, pairs: list[tuple[str, str]], **keys: object) -> tuple[Config, Corpus]:
    lines = "".join(json.dumps({"from": a, "to": b}) + "\n" for a, b in pairs)
    config = make_config(tmp_path)
    config.data.source, config.data.prompt_key, config.data.response_key = "jsonl", "from", "to"
    config.data.chat_template, config.data.packing, config.data.val_fraction = "", "document", 0.2
    config.model.encoder_layers, config.model.encoder_len, config.batch_size = 1, 24, 4
    for key, value in keys.items():
        setattr(config.data, key, value)
    config.data.path = str(write(tmp_path, {"pairs.jsonl": lines}) / "pairs.jsonl")
    return config, prepare(config, progress=False)


PAIRS = [(f"number {i}", f"{i:b}") for i in range(100)]


def test_an_epoch_holds_every_pair_once(tmp_path: Path):
    """Batches are a pure function of their number, and split among devices as any other."""
    config, corpus = open_pairs(tmp_path, PAIRS)
    order = make_order(corpus.train, config)
    found = TrainOrder(corpus, config).batches(0, order.rows_per_epoch)
    assert found["prompts"].shape == (order.rows_per_epoch, 4, 24)
    one_epoch = found["targets"].reshape(-1, 16)[: order.rows_per_epoch]
    assert (one_epoch >= 0).sum() == (corpus.train.masks and sum(np.asarray(m).sum() for m in corpus.train.masks))
    again = TrainOrder(corpus, config).batches(3, 2, slice(1, 3))
    for name, x in again.items():
        np.testing.assert_array_equal(x, found[name][3:5, 1:3])
    share = Share(2, of_a_replica=2).shard(found)
    assert share["prompts"].shape == (order.rows_per_epoch, 2, 4, 24)


def test_an_evaluation_scores_every_answer(tmp_path: Path):
    config, corpus = open_pairs(tmp_path, PAIRS)
    batches = list(eval_batches(corpus, config, 4, Share(1)))
    assert len(batches) == num_eval_batches(corpus, config, 4)
    assert corpus.val.masks is not None
    learned = sum(int(np.asarray(mask).sum()) for mask in corpus.val.masks)
    assert sum(int((b.batch["targets"] >= 0).sum()) for b in batches) == learned


def test_inspected_pairs_show_prompt_and_answer(tmp_path: Path):
    config, corpus = open_pairs(tmp_path, PAIRS)
    assert corpus.tokenizer is not None
    batch, texts = View(corpus, config, "train").batch(0), []
    for row in range(4):
        for piece in batch.pieces(row):
            learned = piece.learned
            assert learned.any() and piece.ids[0] == corpus.tokenizer.bos_id
            texts.append(
                tuple(corpus.tokenizer.decode(piece.ids[part][1 - i :]) for i, part in enumerate((~learned, learned)))
            )
    assert len(texts) > 4 and {(a, b.removesuffix("\0")) for a, b in texts} <= set(PAIRS)
    view = View(corpus, config, "train")
    facts = pair_facts(view)
    assert facts is not None and facts.longer_prompts == facts.longer_answers == 0
    filled = [sum(piece.prompt_length for row in range(4) for piece in view.batch(n).pieces(row)) for n in range(5)]
    want = 1 - sum(filled) / (5 * 4 * 24)
    assert 0 < view.padding()[0] < 0.5 and facts.prompt_padding == pytest.approx(want, abs=0.1)


def test_what_is_cut_off_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    config, _ = open_pairs(tmp_path, [*PAIRS, ("x" * 50, "y"), ("x", "y" * 60)] * 3)
    prepare(config)
    said = capsys.readouterr().err
    assert (
        "3 of 306 prompts have more than model.encoder_len = 24 tokens and lose their ends; the longest has 51" in said
    )
    assert "3 of 306 answers have more than seq_len = 16 tokens and lose their ends; the longest has 61" in said


def test_data_without_prompts_is_refused(tmp_path: Path):
    """A store of texts looks like one of pairs until it is opened."""
    config = make_config(tmp_path)
    config.data.path = str(write(tmp_path / "texts", {"a.txt": "some text " * 90, "b.txt": "more text " * 90}))
    config.data.val_fraction = 0.5
    store = prepare(config, progress=False).folder
    config.data.source, config.data.path, config.data.packing = "tokens", str(store), "document"
    config.model.encoder_layers, config.model.encoder_len = 1, 8
    with pytest.raises(
        UserError, match=r"model.encoder_layers is 1, but .* has no prompts and answers; allowed: data with"
    ):
        prepare(config, progress=False)


def test_functions_of_the_standard_library_are_records(tmp_path: Path):
    """Equal docstrings are in one split, in whatever files they are; a record has the whole definition."""
    config, _ = open_pairs(tmp_path, PAIRS)
    config.data.source, config.data.path = "functions", ""
    config.data.prompt_key, config.data.response_key = "docstring", "code"
    corpus, splits = prepare(config, progress=False), []
    assert corpus.tokenizer is not None
    for tokens in (corpus.train, corpus.val):
        pairs, ids = pack_pairs(tokens, 24, 16), np.asarray(tokens)
        texts = {
            corpus.tokenizer.decode(ids[a + 1 : b]): corpus.tokenizer.decode(ids[b:c])
            for a, b, c in zip(pairs.starts, pairs.answers, pairs.stops, strict=True)
        }
        splits.append(texts)
    assert len(splits[0]) > 4000 and not splits[0].keys() & splits[1].keys()
    both = splits[0] | splits[1]
    for docstring, code in itertools.islice(both.items(), 300):
        (function,) = ast.parse(code).body
        assert isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef)
        assert (ast.get_docstring(function) or "").split() == docstring.split()
    assert both["Test whether a path exists.  Returns False for broken symbolic links"].startswith("def exists(path)")


def test_a_form_feed_does_not_begin_a_line_of_code(tmp_path: Path):
    (tmp_path / "old.py").write_text('\x0c\nX = 1\n\x0cY = 2\n\ndef f(x):\n    """Says x."""\n    return x\n')
    ((place, number, record),) = _functions(
        RecordPart("old.py", tmp_path / "old.py", None, 0), make_config(tmp_path).data
    )
    assert (place, number()) == (5, 1)
    assert record["code"] == 'def f(x):\n    """Says x."""\n    return x\n'
