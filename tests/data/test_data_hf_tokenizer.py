"""Hugging Face tokenizers are exact to the byte, or refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings

from configs.base import get_config
from jaxlm.config import UserError
from jaxlm.config.validate import validate
from jaxlm.data.tokenizers import Tokenizer, load_tokenizer, make_tokenizer
from jaxlm.data.tokenizers.base import ByteTokenizer
from jaxlm.data.tokenizers.hf import HfTokenizer
from tests.tokenizing import ANYTHING, CODE, HARD, HF_KINDS, check


@pytest.mark.parametrize("kind", HF_KINDS)
@given(ANYTHING | HARD)
@example("a <s> <0x41> <unk> <|endoftext|><<s>s> self. b")
@example("e\u0301 \u2581 \ud83d\ude00")
@example(CODE[:5000])
@settings(deadline=None)
def test_hf_round_trip_is_exact(hf: dict[str, HfTokenizer], kind: str, text: str):
    """Bytes and bos are exact, whatever the tokenizer.json would do to a text, and whatever the text holds."""
    check(hf[kind], text)


@pytest.mark.parametrize("kind", HF_KINDS)
def test_hf_ids_are_those_of_the_library(hf: dict[str, HfTokenizer], hf_specs: dict[str, str], kind: str):
    """The steps of a tokenizer.json that jaxlm leaves out would not change these texts."""
    from tokenizers import Tokenizer as Library

    library = Library.from_str(hf_specs[kind])
    library.no_truncation()
    library.no_padding()
    for text in (" the value", " def parse_args", " a\n    return é"):
        # All kinds but byte-level put a space in front of a text, so the library gets the text without its space.
        bare = text[1:] if kind != "byte-level" else text
        assert library.encode(bare, add_special_tokens=False).ids == hf[kind].encode([text])[0].tolist()
    assert len(CODE) / len(hf[kind].encode([CODE])[0]) > 1.2


def test_hf_special_tokens_in_a_text_are_text(hf: dict[str, HfTokenizer], monkeypatch: pytest.MonkeyPatch):
    """`_encode_names` is not needed: it is for models whose vocabulary has the names, and it cuts words too."""
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
def test_unusable_hf_files_are_refused(hf_specs: dict[str, str], tmp_path: Path, edit: Any, named: str, allowed: str):
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
    tokenizer.pieces[tokenizer.encode(["q"])[0][0]] = b"Q"  # like a file that changes texts unnoticed
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
    (tmp_path / "model").write_bytes(b"of another kind")
    config.data.tokenizer_path, before = str(tmp_path / "model"), config.data.tokenizer_path
    config.data.tokenizer = "hf"
    with pytest.raises(
        UserError, match=r"not a Hugging Face tokenizer; allowed .*=hf: a tokenizer\.json, a tokenizer\.model or"
    ):
        make_tokenizer(validate(config).data, list, list)
    config.data.tokenizer_path = before
    assert isinstance(make_tokenizer(validate(config).data, list, list), HfTokenizer)
