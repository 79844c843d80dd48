"""Every tokenizer gives back the text it was given, and counts its bytes."""

import importlib
import sysconfig
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from jaxlm.config import UserError
from jaxlm.data.tokenizers import (
    CHUNK,
    ByteTokenizer,
    CharTokenizer,
    SentencePieceTokenizer,
    Tokenizer,
    load_tokenizer,
    spread_sample,
    to_bytes,
    train_sentencepiece,
)

CODE = (Path(sysconfig.get_paths()["stdlib"]) / "argparse.py").read_text("utf-8")
ANYTHING = st.text(st.characters(exclude_categories=[]), max_size=60)  # surrogates and unassigned ones too
HARD = st.lists(
    st.sampled_from(
        ["\u2581", " ", "\n", "\r\n", "\t", "\0", "\ud800", "\udc00", "\u2585", "é", "e\u0301", "漢", "\U0001f600",
         "def ", "self.", "<0x41>", "<s>", "<unk>", "\ufeff", "\ufffd", "\u00a0", "\u3000", "ﬁ", "\x1b", "\n    "]
    ),
    max_size=30,
).map("".join)  # fmt: skip


@pytest.fixture(scope="module")
def sentencepiece() -> SentencePieceTokenizer:
    return SentencePieceTokenizer(train_sentencepiece([CODE], 700), lossless=True, name="test")


def check(tokenizer: Tokenizer, text: str) -> None:
    (ids,) = tokenizer.encode([text])
    assert ids.dtype == np.int32 and ids.ndim == 1
    assert tokenizer.bos_id not in ids
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode(ids.tolist()) == text
    assert tokenizer.bytes_per_token()[ids].sum() == len(to_bytes(text))


@given(ANYTHING | HARD)
def test_bytes_round_trip(text: str):
    check(ByteTokenizer(), text)


@given(ANYTHING | HARD)
def test_chars_round_trip(text: str):
    check(CharTokenizer(sorted(set(text))), text)


@given(ANYTHING | HARD)
@example("\u2581")
@example("a\u2581 \u2581\u2581b")
@example("\ud83d\ude00\0\r\n\t")
@example("\n" * 2500 + "x")
@example("x" * 2500)
@settings(deadline=None)
def test_sentencepiece_round_trip(sentencepiece: SentencePieceTokenizer, text: str):
    check(sentencepiece, text)


@pytest.mark.parametrize(
    "training_text", ["漢字仮名交文\n" * 400, "漢字 仮名\n" + "漢字仮名交文\n" * 4000], ids=["none", "one"]
)
def test_spaces_survive_a_model_of_a_text_without_them(training_text: str):
    """Where no piece has a space, sentencepiece would give the bytes of the U+2581 that it writes for one."""
    tokenizer = SentencePieceTokenizer(train_sentencepiece([training_text], 300), lossless=True, name="test")
    for text in ("a b", " 漢字  仮名 \u2581", "\n x y z\n", " "):
        check(tokenizer, text)


def test_batch_gives_what_each_text_gives_alone(sentencepiece: SentencePieceTokenizer):
    texts = ["", CODE, "\u2581", "a\nb", "", "\ud800x"]
    for tokenizer in (sentencepiece, ByteTokenizer(), CharTokenizer(sorted(set("".join(texts))))):
        for text, ids in zip(texts, tokenizer.encode(texts), strict=True):
            np.testing.assert_array_equal(ids, tokenizer.encode([text])[0])


@given(st.integers(0, len(CODE)))
@settings(max_examples=20, deadline=None)
def test_text_can_be_cut_before_newlines(sentencepiece: SentencePieceTokenizer, near: int):
    """The promise that reading long files in parts rests on."""
    cut = len(CODE[: CODE.rfind("\n", 0, near) + 1].rstrip("\n"))
    a, b = sentencepiece.encode([CODE[:cut], CODE[cut:]])
    np.testing.assert_array_equal(np.concatenate([a, b]), sentencepiece.encode([CODE])[0])


@given(st.text("a\n", max_size=5000) | st.integers(0, 3000).map("\n".__mul__))
@settings(max_examples=30)
def test_chunks_are_the_text_in_order(text: str):
    assert "".join(CHUNK.findall(text)) == text


def test_sentencepiece_training_repeats(sentencepiece: SentencePieceTokenizer):
    assert train_sentencepiece([CODE], 700) == sentencepiece._model


def test_pieces_hold_indentation_and_words(sentencepiece: SentencePieceTokenizer):
    """That several spaces or words share a piece is what makes code short."""
    (ids,) = sentencepiece.encode([CODE])
    assert len(CODE) / len(ids) > 2.8
    assert len(sentencepiece.encode(["\n        self."])[0]) <= 2


def test_small_corpora_give_smaller_vocabularies():
    tokenizer = SentencePieceTokenizer(train_sentencepiece(["abcabc abc\n"], 5000), lossless=True, name="test")
    assert 258 < tokenizer.vocab_size < 400
    check(tokenizer, "abc xyz")


def test_alphabets_larger_than_the_vocabulary_fall_back_to_bytes():
    han = "".join(map(chr, range(0x4E00, 0x4E00 + 3000)))
    tokenizer = SentencePieceTokenizer(train_sentencepiece([han[i : i + 50] for i in range(3000)], 2048), True, "test")
    assert tokenizer.vocab_size <= 2048
    check(tokenizer, han)


def test_impossible_vocabulary_names_the_key():
    with pytest.raises(UserError, match=r"data\.vocab_size is 10"):
        train_sentencepiece([CODE], 10)


def test_unknown_character_is_named():
    with pytest.raises(UserError, match=r"'é' \(U\+00E9\)"):
        CharTokenizer(["a", "b"]).encode(["ab", "aéb"])


def test_malformed_utf8_decodes_to_replacement_characters():
    assert ByteTokenizer().decode([104, 0xFF, 105]) == "h\ufffdi"


@pytest.mark.parametrize("kind", ["bytes", "chars", "sentencepiece"])
def test_saved_tokenizers_load(tmp_path: Path, sentencepiece: SentencePieceTokenizer, kind: str):
    tokenizer = {"bytes": ByteTokenizer(), "chars": CharTokenizer(["a", "\n", "漢", "\ud800"])}.get(kind, sentencepiece)
    tokenizer.save(tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert type(loaded) is type(tokenizer)
    assert loaded.pieces == tokenizer.pieces and loaded.bos_id == tokenizer.bos_id
    text = "a漢\n\ud800"
    np.testing.assert_array_equal(loaded.encode([text])[0], tokenizer.encode([text])[0])
    check(loaded, text)
    if kind == "sentencepiece":
        check(load_tokenizer(tmp_path / "sentencepiece.model"), "a\u2581b")


@pytest.mark.parametrize(
    "content", [None, "{", "[]", '{"kind": "wordpiece"}', '{"kind": "chars"}', '{"kind": "sentencepiece"}']
)
def test_unusable_tokenizers_name_the_file(tmp_path: Path, content: str | None):
    if content is not None:
        (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(UserError, match=str(tmp_path)):
        load_tokenizer(tmp_path)


def test_models_made_elsewhere(tmp_path: Path):
    """With sentencepiece's own defaults: a space is put before the text, and is no part of it."""
    sentencepiece: Any = importlib.import_module("sentencepiece")  # whose functions no type checker sees
    prefix, text = tmp_path / "other", tmp_path / "text"
    text.write_text(CODE)
    sentencepiece.SentencePieceTrainer.train(
        input=str(text), model_prefix=str(prefix), vocab_size=500, minloglevel=2, num_threads=1
    )
    tokenizer = load_tokenizer(f"{prefix}.model")
    assert tokenizer.decode(tokenizer.encode(["return the value"])[0]) == "return the value"
    assert tokenizer.bos_id == 1 and tokenizer.vocab_size == 500
    tokenizer.save(tmp_path)
    assert load_tokenizer(tmp_path).pieces == tokenizer.pieces

    sentencepiece.SentencePieceTrainer.train(
        input=str(text), model_prefix=str(prefix), vocab_size=500, minloglevel=2, num_threads=1, bos_id=-1
    )
    with pytest.raises(UserError, match="has no bos"):
        load_tokenizer(f"{prefix}.model")
    (tmp_path / "bad.model").write_bytes(b"no model")
    with pytest.raises(UserError, match=r"bad\.model: not a sentencepiece model"):
        load_tokenizer(tmp_path / "bad.model")


@given(st.lists(st.text("ab", min_size=1, max_size=5), max_size=80), st.integers(1, 60))
def test_sample_is_spread_evenly_and_bounded(chunks: list[str], limit: int):
    kept = spread_sample(chunks, limit)
    assert sum(map(len, kept)) <= limit or len(kept) == 1
    steps = [2**i for i in range(10)]
    assert any(kept == chunks[::k] for k in steps)
    if sum(map(len, chunks)) <= limit:
        assert kept == chunks
