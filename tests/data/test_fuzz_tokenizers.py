"""Damaged tokenizers are read or refused in one line, and never crash or hang."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import strategies as st

from jaxlm.config import UserError
from jaxlm.data import load_tokenizer
from jaxlm.data.tokenizers.base import Tokenizer
from jaxlm.data.tokenizers.sentencepiece import SentencePieceTokenizer
from jaxlm.data.tokenizers.sentencepiece_training import train_sentencepiece
from tests.corpora import LINES, write
from tests.fuzzing import changed, damaged, fuzz
from tests.tokenizing import CODE, HF_KINDS

TEXTS = ["def f(x):\n    return x\n", "naïve \u2581 漢字\r\n\t", "", " a  b", "<s>self.<0x41>", LINES[:300]]


def use(tokenizer: Tokenizer) -> None:
    tokenizer.num_threads = 1
    assert 0 <= tokenizer.bos_id < tokenizer.vocab_size == len(tokenizer.bytes_per_token())
    for text in TEXTS:
        (ids,) = tokenizer.encode([text])
        assert ids.dtype == np.int32 and (not ids.size or 0 <= ids.min() <= ids.max() < tokenizer.vocab_size)
        tokenizer.decode(ids)


@pytest.fixture(scope="module")
def model() -> bytes:
    return train_sentencepiece([CODE[:20_000]], 320)


def test_damaged_sentencepiece_models_are_read_or_refused(model: bytes, tmp_path: Path):
    """A model may be a file that a user names, or in the folder of a run, which says that it is lossless."""
    write(tmp_path, {"own/jaxlm_tokenizer.json": '{"kind": "sentencepiece", "lossless": true}'})

    def read(content: bytes) -> None:
        write(tmp_path, {"a.model": content, "own/sentencepiece.model": content})
        use(load_tokenizer(tmp_path / "own"))
        use(load_tokenizer(tmp_path / "a.model"))

    fuzz(damaged([model]), read, 200)


def test_pieces_that_are_no_text_are_refused(model: bytes):
    assert b"\x0a\x06return" not in model and model.count(b"self") > 1
    with pytest.raises(UserError, match=r"a\.model: not a sentencepiece model"):
        SentencePieceTokenizer(model.replace(b"self", b"se\xff\xfe", 1), lossless=True, name="a.model")


def test_damaged_tokenizer_folders_are_read_or_refused(tmp_path: Path):
    chars = {"kind": "chars", "alphabet": sorted(set("".join(TEXTS) + "\ud800"))}
    specs = [{"kind": "bytes"}, chars, chars, {"kind": "hf"}, {"kind": "sentencepiece", "lossless": True}]
    names = st.sampled_from(["jaxlm_tokenizer.json", "tokenizer.json"])
    content = changed(specs) | damaged([json.dumps(spec).encode() for spec in specs])

    def read(case: tuple[str, bytes]) -> None:
        shutil.rmtree(tmp_path / "t", ignore_errors=True)
        use(load_tokenizer(write(tmp_path / "t", {case[0]: case[1]})))

    fuzz(st.tuples(names, content), read, 250)


@pytest.mark.parametrize("name", ["jaxlm_tokenizer.json", "tokenizer.json"])
@pytest.mark.parametrize(
    "content", ["[" * 100_000, '{"kind": ' * 100_000, '{"kind": "chars", "alphabet": [{}]}', '{"kind": []}']
)
def test_invalid_tokenizer_folders_are_refused(tmp_path: Path, name: str, content: str):
    write(tmp_path, {name: content})
    with pytest.raises(UserError, match=rf"{name}: "):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("kind", HF_KINDS)
def test_damaged_hugging_face_tokenizers_are_read_or_refused(hf_specs: dict[str, str], tmp_path: Path, kind: str):
    spec = json.loads(hf_specs[kind])
    patterns = ["(a+)+$", "(x+x+)+y", "(.*)*\\1", "(", "(?<!", "a{99999}", "\\p{L}+", "", "(?=a)"]
    steps = [{"type": "Split", "pattern": {"Regex": p}, "behavior": "Isolated", "invert": False} for p in patterns]
    steps += [spec["pre_tokenizer"], {"type": "Digits", "individual_digits": True}, {"type": "Whitespace"}, {"type": 1}]
    orders = st.lists(st.sampled_from(steps), max_size=3).map(lambda found: [*found, spec["pre_tokenizer"]])

    def with_steps(found: list[Any]) -> bytes:
        return json.dumps(spec | {"pre_tokenizer": {"type": "Sequence", "pretokenizers": found}}).encode()

    content = changed([spec]) | changed([spec]) | damaged([json.dumps(spec).encode()]) | orders.map(with_steps)

    def read(content: bytes) -> None:
        use(load_tokenizer(write(tmp_path, {"tokenizer.json": content}) / "tokenizer.json"))

    fuzz(content, read, 100)


def test_characters_without_a_piece_are_refused(hf_specs: dict[str, str], tmp_path: Path):
    spec = json.loads(hf_specs["metaspace"])
    spec["model"]["unk_id"], spec["model"]["byte_fallback"] = None, True
    spec["model"]["vocab"] = [[piece, score] for piece, score in spec["model"]["vocab"]]
    tokenizer = load_tokenizer(write(tmp_path, {"tokenizer.json": json.dumps(spec)}) / "tokenizer.json")
    tokenizer.num_threads = 1
    with pytest.raises(UserError, match=r"tokenizer\.json: `tokenizers` cannot encode a text with it .*unk_id"):
        tokenizer.encode(["漢字"])
