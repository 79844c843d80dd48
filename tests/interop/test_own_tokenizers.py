"""Tokenizers that jaxlm trains, read by the `tokenizers` library: the same ids, and the text again."""

import dataclasses
import json
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
from tokenizers import Tokenizer as Library

from jaxlm.checkpoint import workdirs
from jaxlm.checkpoint.writing import write_params
from jaxlm.commands import export_hf
from jaxlm.data.tokenizers import Tokenizer, load_tokenizer
from jaxlm.data.tokenizers.base import ByteTokenizer, CharTokenizer
from jaxlm.data.tokenizers.sentencepiece import SentencePieceTokenizer
from jaxlm.data.tokenizers.sentencepiece_training import train_sentencepiece
from jaxlm.interop import own_tokenizers
from jaxlm.interop.importing import import_model
from jaxlm.model import make_model
from jaxlm.run.open_run import open_run
from tests.decoders import BASE, drawn, with_
from tests.tokenizing import CODE

PARTS = [
    "\u2581", " ", "\n", "\r\n", "\t", "\0", "\x1b", "\u2585", "é", "e\u0301", "漢", "\U0001f600",
    "\U0001f469\u200d\U0001f467", "def ", "self.", "<0x41>", "<0xE2>", "<s>", "<unk>", "<|endoftext|>", "<", "s>",
    "\ufeff", "\ufffd", "\u00a0", "\u3000", "ﬁ", "שלום", "مرحبا", "\n    ", " " * 37, "    " * 9, "-" * 33,
    "=" * 71, "abab", "\n" * 1200, "x y<" * 400,
]  # fmt: skip
HAN = "漢字仮名交文\n" * 400


def texts(seed: int = 0) -> Iterator[str]:
    """Hard texts, and random ones: of parts that are difficult, of ASCII, of all of Unicode."""
    yield from ("", CODE, " ".join(PARTS), CODE.replace("\n", " ")[:5000], HAN, "漢字 " + HAN[:6] * 400)
    rng = random.Random(seed)
    for _ in range(200):
        yield "".join(rng.choices(PARTS, k=rng.randint(0, 20)))
        yield "".join(chr(rng.randint(0, 127)) for _ in range(rng.randint(0, 60)))
        points = (
            rng.choice([rng.randint(0, 0xD7FF), rng.randint(0xE000, 0x10FFFF)]) for _ in range(rng.randint(0, 30))
        )
        yield "".join(map(chr, points))


TEXTS = list(texts())


def trained(text: str, pieces: int, kind: str) -> SentencePieceTokenizer:
    model = train_sentencepiece([text], pieces, "unigram" if kind == "unigram" else "bpe")
    return SentencePieceTokenizer(model, lossless=True, name="test")


MAKE = {
    "bpe": lambda: trained(CODE, 700, "bpe"),
    "bpe without spaces": lambda: trained(HAN, 300, "bpe"),
    "unigram": lambda: trained(CODE[:30_000], 500, "unigram"),
    "unigram without spaces and <": lambda: trained(HAN, 300, "unigram"),
    "bytes": ByteTokenizer,
    "chars": lambda: CharTokenizer(sorted(set("".join(TEXTS)))),
}


def same(ours: Tokenizer, folder: Path) -> None:
    theirs = Library.from_file(str(folder / "tokenizer.json"))
    theirs.encode_special_tokens = True  # as split_special_tokens in tokenizer_config.json
    assert theirs.get_vocab_size() == ours.vocab_size
    wanted = [ids.tolist() for ids in ours.encode(TEXTS)]
    for text, ids, found in zip(TEXTS, wanted, theirs.encode_batch(TEXTS), strict=True):
        assert found.ids == [ours.bos_id, *ids], text[:200]
        assert theirs.decode(found.ids) == text


@pytest.mark.parametrize("name", MAKE)
def test_ids_are_the_same_and_decode_to_the_text(name: str, tmp_path: Path) -> None:
    ours = MAKE[name]()
    assert own_tokenizers.write(ours, tmp_path)
    same(ours, tmp_path)
    again = load_tokenizer(tmp_path)  # jaxlm reads it back
    wanted, found = ours.encode(TEXTS), again.encode(TEXTS)
    assert [ids.tolist() for ids in found] == [ids.tolist() for ids in wanted]
    assert (again.bos_id, again.end_ids) == (ours.bos_id, ours.end_ids)


def test_characters_that_are_unknown_are_refused(tmp_path: Path) -> None:
    own_tokenizers.write(CharTokenizer(["a", "b", "\ud800"]), tmp_path)
    theirs = Library.from_file(str(tmp_path / "tokenizer.json"))
    assert theirs.encode("ba").ids == [3, 1, 0] and theirs.decode([0, 2]) == "a<U+D800>"
    with pytest.raises(Exception, match="WordLevel error: Missing"):
        theirs.encode("abc")


def test_a_tokenizer_made_elsewhere_keeps_its_own_files(tmp_path: Path) -> None:
    model = MAKE["bpe"]()._model
    assert not own_tokenizers.write(SentencePieceTokenizer(model, lossless=False, name="test"), tmp_path)
    assert not any(tmp_path.iterdir())


def test_an_export_has_the_tokenizer_and_an_import_takes_it(tmp_path: Path) -> None:
    ours = MAKE["bpe"]()
    c = with_(norm="rmsnorm", activation="swiglu", num_layers=1)
    with workdirs.Lock() as lock:
        facts = {"data_fingerprint": "", "vocab_size": ours.vocab_size}
        workdirs.claim(tmp_path / "run", dataclasses.replace(BASE, model=c, seq_len=32), facts, None, lock)
    workdirs.save_tokenizer(tmp_path / "run", ours)
    write_params(tmp_path / "run", drawn(make_model(c, ours.vocab_size, 32)))
    assert export_hf.main([str(tmp_path / "run"), str(tmp_path / "hf")]) == 0
    same(ours, tmp_path / "hf")
    names = json.loads((tmp_path / "hf/tokenizer_config.json").read_text())
    assert names["bos_token"] == names["eos_token"] == "<s>" and names["split_special_tokens"]
    import_model(tmp_path / "hf", tmp_path / "again")
    found = open_run(tmp_path / "again", None).tokenizer
    assert found and found.encode([CODE])[0].tolist() == ours.encode([CODE])[0].tolist()
