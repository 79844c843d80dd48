"""Every tokenizer gives back the text it was given, and counts its bytes."""

import importlib.metadata
import json
import shutil
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from configs.base import get_config
from jaxlm.config import UserError, validate
from jaxlm.data.hf_tokenizer import HfTokenizer
from jaxlm.data.sentencepiece_tokenizer import CHUNK, SentencePieceTokenizer, spread_sample, train_sentencepiece
from jaxlm.data.sources import open_source
from jaxlm.data.store import _saved_hash, _tokenizer_key, stored_tokenizer
from jaxlm.data.tokenizer_base import ByteTokenizer, CharTokenizer
from jaxlm.data.tokenizers import Tokenizer, load_tokenizer, make_tokenizer, to_bytes

CODE = (Path(sysconfig.get_paths()["stdlib"]) / "argparse.py").read_text("utf-8")
ANYTHING = st.text(st.characters(exclude_categories=[]), max_size=60)  # surrogates and unassigned ones too
HARD = st.lists(
    st.sampled_from(
        ["\u2581", " ", "\n", "\r\n", "\t", "\0", "\ud800", "\udc00", "\u2585", "é", "e\u0301", "漢", "\U0001f600",
         "def ", "self.", "<0x41>", "<s>", "<unk>", "<|endoftext|>", "<", "s>",
         "\ufeff", "\ufffd", "\u00a0", "\u3000", "ﬁ", "\x1b", "\n    "]
    ),
    max_size=30,
).map("".join)  # fmt: skip


@pytest.fixture(scope="module")
def sentencepiece() -> SentencePieceTokenizer:
    return SentencePieceTokenizer(train_sentencepiece([CODE], 700), lossless=True, name="test")


@pytest.fixture(scope="module")
def unigram() -> SentencePieceTokenizer:
    return SentencePieceTokenizer(train_sentencepiece([CODE[:30_000]], 500, "unigram"), lossless=True, name="test")


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
def test_spaces_survive_a_model_of_a_text_without_them(training_text: str, kind: Any):
    """Where no piece has a space, sentencepiece would give the bytes of the U+2581 that it writes for one."""
    tokenizer = SentencePieceTokenizer(train_sentencepiece([training_text], 300, kind), lossless=True, name="test")
    for text in ("a b", " 漢字  仮名 \u2581", "\n x y z\n", " "):
        check(tokenizer, text)


def test_batch_gives_what_each_text_gives_alone(
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
    """The promise that reading long files in parts rests on."""
    cut = len(CODE[: CODE.rfind("\n", 0, near) + 1].rstrip("\n"))
    for tokenizer in (sentencepiece, unigram):
        a, b = tokenizer.encode([CODE[:cut], CODE[cut:]])
        np.testing.assert_array_equal(np.concatenate([a, b]), tokenizer.encode([CODE])[0])


def test_whole_lines_get_the_ids_of_the_bare_library(sentencepiece: SentencePieceTokenizer):
    """Cutting text, and giving each line once, is for speed alone."""
    text = CODE[:900]
    assert sentencepiece.encode([text])[0].tolist() == sentencepiece._processor.encode(text)
    text = CODE[900:1800] + "\nx\n"
    assert sentencepiece.encode([text * 3])[0].tolist() == sentencepiece._processor.encode(text * 3)


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
def test_chunks_are_the_text_in_order(text: str):
    assert "".join(CHUNK.findall(text)) == text


def test_sentencepiece_training_repeats(sentencepiece: SentencePieceTokenizer):
    assert train_sentencepiece([CODE], 700) == sentencepiece._model


def test_unigram_training_repeats_with_as_many_threads_everywhere(unigram: SentencePieceTokenizer):
    assert train_sentencepiece([CODE[:30_000]], 500, "unigram") == unigram._model
    model = importlib.import_module("sentencepiece.sentencepiece_model_pb2").ModelProto()  # made at run time
    model.ParseFromString(unigram._model)
    assert model.trainer_spec.num_threads == 16


def test_the_kind_of_model_is_that_of_the_configuration(tmp_path: Path):
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


def test_pieces_hold_indentation_and_words(sentencepiece: SentencePieceTokenizer):
    """That several spaces or words share a piece is what makes code short."""
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
    if old and kind != "hf":  # its name when it could not be taken for Hugging Face's
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


# -- Hugging Face


def hf_spec(kind: str) -> dict[str, Any]:
    """The tokenizer.json of a small tokenizer that the library trains; all that changes texts is on, as in the wild."""
    from tokenizers import Tokenizer as Library
    from tokenizers import models, normalizers, pre_tokenizers, processors, trainers

    markup = ["<unk>", "<s>"]
    fallback = [f"<0x{i:02X}>" for i in range(256)]
    sign = "\u2581"
    if kind == "byte-level":
        library: Any = Library(models.BPE())  # whose type stubs leave properties without setters
        library.normalizer = normalizers.NFC()
        library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(
            vocab_size=600, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
        )
    elif kind == "byte fallback":
        library = Library(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
        library.normalizer = normalizers.Sequence([normalizers.Prepend(sign), normalizers.Replace(" ", sign)])
        trainer = trainers.BpeTrainer(vocab_size=700, special_tokens=markup + fallback, show_progress=False)
    else:
        library = Library(models.Unigram())
        library.pre_tokenizer = pre_tokenizers.Metaspace()
        trainer = trainers.UnigramTrainer(
            vocab_size=400, unk_token="<unk>", special_tokens=markup + fallback, show_progress=False
        )
    library.train_from_iterator(CODE.splitlines(), trainer)
    bos = "<|endoftext|>" if kind == "byte-level" else "<s>"
    template = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, library.token_to_id(bos))])
    library.post_processor = template
    library.enable_truncation(5)
    library.enable_padding(length=7)
    spec = json.loads(library.to_str())
    spec["added_tokens"] = [token for token in spec["added_tokens"] if token["content"] not in fallback]
    literal = {"id": 1000, "content": "self.", "single_word": False, "lstrip": True, "rstrip": True,
               "normalized": False, "special": False}  # fmt: skip
    spec["added_tokens"].append(literal)
    if kind == "metaspace":
        spec["model"]["byte_fallback"] = True
    return spec


HF_KINDS = ("byte-level", "byte fallback", "metaspace")


@pytest.fixture(scope="module")
def hf(hf_specs: dict[str, str]) -> dict[str, HfTokenizer]:
    return {kind: HfTokenizer(spec.encode(), "test") for kind, spec in hf_specs.items()}


@pytest.fixture(scope="module")
def hf_specs() -> dict[str, str]:
    return {kind: json.dumps(hf_spec(kind)) for kind in HF_KINDS}


@pytest.mark.parametrize("kind", HF_KINDS)
@given(ANYTHING | HARD)
@example("a <s> <0x41> <unk> <|endoftext|><<s>s> self. b")
@example("e\u0301 \u2581 \ud83d\ude00")
@example(CODE[:5000])
@settings(deadline=None)
def test_hf_round_trip(hf: dict[str, HfTokenizer], kind: str, text: str):
    """Bytes and bos are exact, whatever the tokenizer.json would do to a text, and whatever is written in it."""
    check(hf[kind], text)


@pytest.mark.parametrize("kind", HF_KINDS)
def test_hf_ids_are_those_of_the_library(hf: dict[str, HfTokenizer], hf_specs: dict[str, str], kind: str):
    """Where nothing of what jaxlm leaves out would have acted."""
    from tokenizers import Tokenizer as Library

    library = Library.from_str(hf_specs[kind])
    library.no_truncation()
    library.no_padding()
    for text in (" the value", " def parse_args", " a\n    return é"):
        # a text with a space in front; the ids of a text without one begin with those of a space that was put there
        bare = text[1:] if kind != "byte-level" else text
        assert library.encode(bare, add_special_tokens=False).ids == hf[kind].encode([text])[0].tolist()
    assert len(CODE) / len(hf[kind].encode([CODE])[0]) > 1.2


def test_hf_special_tokens_in_a_text_are_text(hf: dict[str, HfTokenizer], monkeypatch: pytest.MonkeyPatch):
    """At once: cutting their names is for models whose vocabulary has them, and cuts words too."""
    monkeypatch.delattr(HfTokenizer, "_encode_names")
    (ids,) = hf["byte-level"].encode(["<|endoftext|>"])
    assert len(ids) > 1 and hf["byte-level"].bos_id not in ids
    assert hf["byte-level"].decode([hf["byte-level"].bos_id]) == ""


@pytest.mark.parametrize("given_as", ["folder", "file", "other name", "saved", "file of saved"])
def test_hf_files_load(hf: dict[str, HfTokenizer], hf_specs: dict[str, str], tmp_path: Path, given_as: str):
    tokenizer = hf["byte-level"]
    if "saved" in given_as:
        tokenizer.save(tmp_path)
        assert (tmp_path / "tokenizer.json").read_text() == hf_specs["byte-level"]
        assert json.loads((tmp_path / "jaxlm_tokenizer.json").read_text()) == {"kind": "hf"}
    path = tmp_path / ("gpt2.json" if given_as == "other name" else "tokenizer.json")
    path.write_text(hf_specs["byte-level"])
    loaded = load_tokenizer(tmp_path if given_as in ("folder", "saved") else path)
    assert loaded.pieces == tokenizer.pieces and loaded.bos_id == tokenizer.bos_id
    check(loaded, CODE[:1000])


def _set(*keys: str, to: Any) -> Callable[[dict[str, Any]], None]:
    def edit(spec: dict[str, Any]) -> None:
        for key in keys[:-1]:
            spec = spec[key]
        spec[keys[-1]] = to

    return edit


def _no_byte(spec: dict[str, Any]) -> None:
    del spec["model"]["vocab"]["\u0100"]
    spec["model"]["merges"] = []


@pytest.mark.parametrize(
    ("edit", "named", "allowed"),
    [
        (_set("model", "type", to="WordPiece"), "model.type is 'WordPiece'", "BPE, Unigram"),
        (_set("normalizer", to={"type": "Lowercase"}), "normalizer is 'Lowercase'", "NFC"),
        (_set("normalizer", to={"type": "Sequence", "normalizers": [{"type": "NFKC"}]}), "normalizer is 'NFKC'", "NFC"),
        (_set("normalizer", to={"type": "Replace", "pattern": {"String": "a"}, "content": "b"}), "'Replace'", "NFC"),
        (_set("pre_tokenizer", to=None), "model.byte_fallback is False", "ByteLevel"),
        (_set("pre_tokenizer", to={"type": "Sequence", "pretokenizers": [
            {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
            {"type": "Whitespace"}]}), "pre_tokenizer is 'Whitespace'", "Split"),
        (_set("pre_tokenizer", to={"type": "Sequence", "pretokenizers": [
            {"type": "Split", "pattern": {"String": " "}, "behavior": "Removed", "invert": False},
            {"type": "ByteLevel"}]}), "pre_tokenizer is 'Split Removed'", "remove nothing"),
        (_set("model", "end_of_word_suffix", to="</w>"), "model.end_of_word_suffix is '</w>'", "none"),
        (_no_byte, "without 1 of the 256 bytes", "all of them"),
        (_set("added_tokens", to=[]), "special tokens are []", "<|endoftext|>"),
        (_set("model", "merges", to=[["a", "nowhere"]]), "not a Hugging Face tokenizer.json", "reads"),
    ],
)  # fmt: skip
def test_hf_refusals(hf_specs: dict[str, str], tmp_path: Path, edit: Any, named: str, allowed: str):
    spec = json.loads(hf_specs["byte-level"])
    edit(spec)
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(spec))
    with pytest.raises(UserError) as error:
        load_tokenizer(tmp_path)
    message = str(error.value)
    assert "\n" not in message and message.startswith(f"{path}: ")
    assert named in message and allowed in message.split("allowed: ")[1]


def test_a_text_that_ids_do_not_give_back_is_refused(hf_specs: dict[str, str]):
    tokenizer = HfTokenizer(hf_specs["byte-level"].encode(), "my/tokenizer.json")
    tokenizer.pieces[tokenizer.encode(["q"])[0][0]] = b"Q"  # as a file would that changes texts unnoticed
    check(tokenizer, "a b")
    with pytest.raises(UserError, match=r"^my/tokenizer.json: changes the text 'a q'; allowed: .*$"):
        tokenizer.encode(["a b", "a q"])


def test_hf_needs_a_path_and_its_own_kind_of_file(hf: dict[str, HfTokenizer], tmp_path: Path):
    config = get_config()
    config.data.tokenizer = "hf"
    with pytest.raises(UserError, match=r"^data\.tokenizer_path is ''; allowed: .*$"):
        validate(config)
    kinds: list[tuple[Any, Tokenizer]] = [("hf", ByteTokenizer()), ("sentencepiece", hf["metaspace"])]
    for kind, saved in kinds:
        (tmp_path / kind).mkdir()
        saved.save(tmp_path / kind)
        config.data.tokenizer, config.data.tokenizer_path = kind, str(tmp_path / kind)
        with pytest.raises(UserError, match=rf"^data\.tokenizer_path is .*allowed with data\.tokenizer={kind}: .*$"):
            make_tokenizer(validate(config).data, list, list)
    config.data.tokenizer = "hf"
    assert isinstance(make_tokenizer(validate(config).data, list, list), HfTokenizer)


def test_the_store_is_named_after_the_kind_of_model_and_the_file(hf: dict[str, HfTokenizer], tmp_path: Path):
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


def test_a_model_is_another_tokenizer_than_its_folder(tmp_path: Path):
    """The folder says that it is lossless; the bare model is taken for one made elsewhere."""
    SentencePieceTokenizer(train_sentencepiece([CODE], 400), lossless=True, name="test").save(tmp_path)
    shutil.copy(tmp_path / "sentencepiece.model", tmp_path / "bare.model")
    data = get_config().data
    names = set()
    for path in (tmp_path, tmp_path / "sentencepiece.model", tmp_path / "bare.model"):
        data.tokenizer_path = str(path)
        names.add(stored_tokenizer(data, [], progress=False)[1])
    assert len(names) == 2
