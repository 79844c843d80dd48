"""Every tokenizer gives back the text it was given, and counts its bytes."""

import importlib.metadata
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from configs.base import get_config
from jaxlm.config import UserError
from jaxlm.data.sources.opening import open_source
from jaxlm.data.store import _saved_hash, _tokenizer_key, stored_tokenizer
from jaxlm.data.tokenizers import Tokenizer, load_tokenizer, make_tokenizer
from jaxlm.data.tokenizers import sentencepiece as sentencepiece_lib
from jaxlm.data.tokenizers.base import ByteTokenizer, CharTokenizer
from jaxlm.data.tokenizers.hf import HfTokenizer
from jaxlm.data.tokenizers.sentencepiece import SentencePieceTokenizer
from jaxlm.data.tokenizers.sentencepiece_training import CHUNK, sample_characters, spread_sample, train_sentencepiece
from tests.tokenizing import ANYTHING, CODE, HARD, check


@pytest.fixture(scope="module")
def sentencepiece() -> SentencePieceTokenizer:
    return SentencePieceTokenizer(train_sentencepiece([CODE], 700), lossless=True, name="test")


@pytest.fixture(scope="module")
def unigram() -> SentencePieceTokenizer:
    return SentencePieceTokenizer(train_sentencepiece([CODE[:30_000]], 500, "unigram"), lossless=True, name="test")


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
@example("x" * 2001)
@settings(deadline=None)
def test_sentencepiece_round_trip(sentencepiece: SentencePieceTokenizer, text: str):
    check(sentencepiece, text)


@given(ANYTHING | HARD)
@example("a\u2581 \u2581\u2581b")
@example("\n" * 2500 + "x" * 2500)
@settings(deadline=None)
def test_unigram_round_trip(unigram: SentencePieceTokenizer, text: str):
    check(unigram, text)


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
@pytest.mark.parametrize(
    "training_text", ["漢字仮名交文\n" * 400, "漢字 仮名\n" + "漢字仮名交文\n" * 4000], ids=["none", "one"]
)
def test_spaces_survive_a_model_trained_without_spaces(training_text: str, kind: Any):
    """If no piece has a space, sentencepiece alone would give the bytes of U+2581, which it writes for a space."""
    tokenizer = SentencePieceTokenizer(train_sentencepiece([training_text], 300, kind), lossless=True, name="test")
    for text in ("a b", " 漢字  仮名 \u2581", "\n x y z\n", " "):
        check(tokenizer, text)


def test_a_batch_gives_the_same_ids_as_each_text_alone(
    sentencepiece: SentencePieceTokenizer, unigram: SentencePieceTokenizer, hf: dict[str, HfTokenizer]
):
    texts = ["", CODE, "\u2581", "a\nb", "", "\ud800x"]
    for tokenizer in (
        sentencepiece,
        unigram,
        *hf.values(),
        ByteTokenizer(),
        CharTokenizer(sorted(set("".join(texts)))),
    ):
        for text, ids in zip(texts, tokenizer.encode(texts), strict=True):
            np.testing.assert_array_equal(ids, tokenizer.encode([text])[0])


@given(st.integers(0, len(CODE)))
@settings(max_examples=20, deadline=None)
def test_text_can_be_cut_before_newlines(
    sentencepiece: SentencePieceTokenizer, unigram: SentencePieceTokenizer, near: int
):
    """Reading long files in parts relies on this."""
    cut = len(CODE[: CODE.rfind("\n", 0, near) + 1].rstrip("\n"))
    for tokenizer in (sentencepiece, unigram):
        a, b = tokenizer.encode([CODE[:cut], CODE[cut:]])
        np.testing.assert_array_equal(np.concatenate([a, b]), tokenizer.encode([CODE])[0])


def test_whole_lines_get_the_ids_of_the_library(sentencepiece: SentencePieceTokenizer):
    """Cutting a text, and encoding repeated lines only once, serves speed alone."""
    text = CODE[:900]
    assert sentencepiece.encode([text])[0].tolist() == sentencepiece.processor.encode(text)
    text = CODE[900:1800] + "\nx\n"
    assert sentencepiece.encode([text * 3])[0].tolist() == sentencepiece.processor.encode(text * 3)


def test_threads_do_not_change_ids(sentencepiece: SentencePieceTokenizer, hf: dict[str, HfTokenizer]):
    for tokenizer in (sentencepiece, *hf.values()):
        assert tokenizer.num_threads >= 1
        texts, before = CODE.split("\n\n"), tokenizer.num_threads
        found = []
        for tokenizer.num_threads in (1, 2):
            found.append(tokenizer.encode(texts))
        tokenizer.num_threads = before
        for a, b in zip(*found, strict=True):
            np.testing.assert_array_equal(a, b)


@given(st.text("a\n", max_size=5000) | st.integers(0, 3000).map("\n".__mul__))
@settings(max_examples=30)
def test_chunks_join_to_the_text(text: str):
    assert "".join(CHUNK.findall(text)) == text


def test_sentencepiece_training_is_repeatable(sentencepiece: SentencePieceTokenizer):
    assert train_sentencepiece([CODE], 700) == sentencepiece._model


def test_unigram_training_is_repeatable_and_always_uses_16_threads(unigram: SentencePieceTokenizer):
    assert train_sentencepiece([CODE[:30_000]], 500, "unigram") == unigram._model
    model = importlib.import_module("sentencepiece.sentencepiece_model_pb2").ModelProto()  # generated at run time
    model.ParseFromString(unigram._model)
    assert model.trainer_spec.num_threads == 16


def test_the_configuration_chooses_the_kind_of_model(tmp_path: Path):
    data = get_config().data
    models = {}
    for data.sentencepiece in ("bpe", "unigram"):
        data.vocab_size = 320
        tokenizer = make_tokenizer(data, lambda: [CODE[:5000]], lambda: [CODE[:5000]])
        assert isinstance(tokenizer, SentencePieceTokenizer)
        models[data.sentencepiece] = tokenizer._model
        assert tokenizer._model == train_sentencepiece(
            spread_sample(CHUNK.findall(CODE[:5000]), 10**6), 320, data.sentencepiece
        )
    assert models["bpe"] != models["unigram"]


def test_a_unigram_model_is_not_trained_on_all_of_a_large_text(monkeypatch: pytest.MonkeyPatch):
    """Training on all of it would take minutes. Models with more pieces read more of the text."""
    sizes = [sample_characters("unigram", n) for n in (300, 2048, 8192, 100_000)]
    assert sizes == [2_000_000, 2_048_000, 8_192_000, 20_000_000] and sample_characters("bpe", 300) == 20_000_000
    seen: list[int] = []

    def trained(texts: list[str], *rest: object) -> bytes:
        seen.append(sum(map(len, texts)))
        return train_sentencepiece([CODE[:5000]], 300)

    monkeypatch.setattr(sentencepiece_lib, "train_sentencepiece", trained)
    data = get_config().data
    data.vocab_size, text = 1024, CODE[:50_000] * 100
    for data.sentencepiece in ("bpe", "unigram"):
        make_tokenizer(data, lambda: [text], list)
    assert seen[0] == len(text) > 4_000_000 and 1_000_000 < seen[1] <= 2_000_000


def test_pieces_hold_indentation_and_words(sentencepiece: SentencePieceTokenizer):
    """Code becomes few tokens because several spaces or words share a piece."""
    (ids,) = sentencepiece.encode([CODE])
    assert len(CODE) / len(ids) > 2.8
    assert len(sentencepiece.encode(["\n        self."])[0]) <= 2


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_small_corpora_give_smaller_vocabularies(kind: Any):
    tokenizer = SentencePieceTokenizer(train_sentencepiece(["abcabc abc\n"], 5000, kind), lossless=True, name="test")
    assert 258 < tokenizer.vocab_size < 400
    check(tokenizer, "abc xyz")


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_alphabets_larger_than_the_vocabulary_fall_back_to_bytes(kind: Any):
    han = "".join(map(chr, range(0x4E00, 0x4E00 + 3000)))
    model = train_sentencepiece([han[i : i + 50] for i in range(3000)], 2048, kind)
    tokenizer = SentencePieceTokenizer(model, lossless=True, name="test")
    assert tokenizer.vocab_size <= 2048
    check(tokenizer, han)


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_impossible_vocabulary_names_the_key(kind: Any):
    with pytest.raises(UserError, match=r"data\.vocab_size is 10"):
        train_sentencepiece([CODE], 10, kind)


def test_unknown_character_is_named():
    with pytest.raises(UserError, match=r"'é' \(U\+00E9\)"):
        CharTokenizer(["a", "b"]).encode(["ab", "aéb"])


def test_malformed_utf8_decodes_to_replacement_characters():
    assert ByteTokenizer().decode([104, 0xFF, 105]) == "h\ufffdi"


@pytest.mark.parametrize("kind", ["bytes", "chars", "sentencepiece", "unigram", "hf"])
@pytest.mark.parametrize("old", [False, True], ids=["new", "old"])
def test_saved_tokenizers_load(
    tmp_path: Path, sentencepiece: Tokenizer, unigram: Tokenizer, hf: dict[str, HfTokenizer], kind: str, old: bool
):
    tokenizer = {
        "bytes": ByteTokenizer(),
        "chars": CharTokenizer(["a", "\n", "漢", "\ud800"]),
        "sentencepiece": sentencepiece,
        "unigram": unigram,
        "hf": hf["byte-level"],
    }[kind]
    tokenizer.save(tmp_path)
    if old and kind != "hf":  # its name in older versions, which is that of Hugging Face's file
        (tmp_path / "jaxlm_tokenizer.json").rename(tmp_path / "tokenizer.json")
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
        (tmp_path / "jaxlm_tokenizer.json").write_text(content)
    with pytest.raises(UserError, match=str(tmp_path)):
        load_tokenizer(tmp_path)
    if content is not None:
        (tmp_path / "jaxlm_tokenizer.json").rename(tmp_path / "tokenizer.json")
        with pytest.raises(UserError, match=str(tmp_path / "tokenizer.json") + "|sentencepiece.model"):
            load_tokenizer(tmp_path)


def test_models_made_elsewhere_load(tmp_path: Path):
    """With sentencepiece's own defaults, a space is added before the text, and removed by decoding."""
    sentencepiece: Any = importlib.import_module("sentencepiece")  # type checkers do not see its functions
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


def test_a_stores_name_depends_on_the_kind_of_model_and_the_file(hf: dict[str, HfTokenizer], tmp_path: Path):
    data = get_config().data
    source = open_source(data)
    bpe = _tokenizer_key(data, [source])
    data.sentencepiece = "unigram"
    assert _tokenizer_key(data, [source]) != bpe
    before = _saved_hash(hf["metaspace"])
    hf["metaspace"].save(tmp_path)
    (tmp_path / "model.safetensors").write_text("weights")
    data.tokenizer, data.tokenizer_path = "hf", str(tmp_path)
    assert stored_tokenizer(data, [], progress=False)[1] == before
    data.tokenizer_path = str(tmp_path / "tokenizer.json")
    assert stored_tokenizer(data, [], progress=False)[1] == before
    hf["byte-level"].save(tmp_path)
    assert stored_tokenizer(data, [], progress=False)[1] != before


def test_a_bare_model_is_another_tokenizer_than_its_folder(tmp_path: Path):
    """The folder says that its model is lossless, and a copy of the bare model counts as made elsewhere."""
    SentencePieceTokenizer(train_sentencepiece([CODE], 400), lossless=True, name="test").save(tmp_path)
    shutil.copy(tmp_path / "sentencepiece.model", tmp_path / "bare.model")
    data = get_config().data
    names = set()
    for path in (tmp_path, tmp_path / "sentencepiece.model", tmp_path / "bare.model"):
        data.tokenizer_path = str(path)
        names.add(stored_tokenizer(data, [], progress=False)[1])
    assert len(names) == 2
