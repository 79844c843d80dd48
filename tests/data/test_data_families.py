"""Texts have the ids that each family's own tokenizer gives them, token by token, except where it changes texts.

The `tokenizers` library is what `transformers` encodes with; tests marked `peers` compare with `transformers` itself.
"""

import importlib
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxlm.data.sources.documents import Document
from jaxlm.data.tokenizers import load_tokenizer
from jaxlm.data.tokenizers.hf import HfTokenizer
from jaxlm.data.tokenizers.markup import encode_marked
from jaxlm.data.tokenizers.sentencepiece import SentencePieceTokenizer
from tests.families import ADDED, HARD_SAMPLE, NOT_NFC, SCRIPTS, family
from tests.tokenizing import CODE, check

# Families whose files put a space before every text, which jaxlm does only where a Jinja template writes the text.
ADD_SPACE = ("llama2", "phi3", "mistral")
MARKUP = (
    "<|user|>\n  Hi<|end|>\n<|assistant|>\nA <|im_start|>b<|im_end|>\n[INST] x [/INST] y</s> <start_of_turn>user\n z"
    "<end_of_turn>\n<tool_call>\n\n\n<|eot_id|> <|endoftext|>"
)


def ours(name: str) -> HfTokenizer:
    return HfTokenizer(family(name).encode(), name)


def theirs(name: str) -> Any:
    from tokenizers import Tokenizer as Library

    return Library.from_str(family(name))


def marked(tokenizer: Any, text: str, first: bool = True) -> list[int]:
    """The ids of a text that a Jinja template wrote."""
    whole = Document("", text, "train", first, markup=((0, len(text)),), shipped=True)
    return encode_marked(tokenizer, [whole])[0].tolist()


@pytest.mark.parametrize("name", ADDED)
def test_a_hard_text_has_the_ids_of_the_library(name: str):
    library, tokenizer = theirs(name), ours(name)
    library.encode_special_tokens = True  # names of special tokens in a text are text
    expected = library.encode(HARD_SAMPLE, add_special_tokens=False).ids
    space = " " if name in ADD_SPACE else ""
    assert tokenizer.encode([space + HARD_SAMPLE])[0].tolist() == expected
    assert len(tokenizer.encode([CODE])[0]) < 0.5 * len(CODE)  # merges are at work
    check(tokenizer, HARD_SAMPLE)


@pytest.mark.parametrize("name", ADDED)
@pytest.mark.parametrize("text", [HARD_SAMPLE, MARKUP], ids=["hard", "markup"])
def test_what_a_template_writes_has_the_ids_of_the_library(name: str, text: str):
    """Special tokens become ids and take the spaces that they take in the file."""
    bos = ADDED[name][0][0]
    expected = theirs(name).encode(bos + text, add_special_tokens=False).ids
    tokenizer = ours(name)
    assert expected[0] == tokenizer.bos_id
    assert marked(tokenizer, text) == expected[1:]
    assert text != MARKUP or set(expected[1:]) & set(tokenizer.specials.values())


def test_the_steps_that_are_left_out_are_the_documented_ones():
    """Letters that Qwen's file composes stay as they are, and the space before a text is not put there."""
    library, tokenizer = theirs("qwen"), ours("qwen")
    assert tokenizer.encode([NOT_NFC])[0].tolist() != library.encode(NOT_NFC).ids
    check(tokenizer, NOT_NFC)
    llama = ours("llama2")
    assert llama.encode(["return"])[0].tolist() != theirs("llama2").encode("return", add_special_tokens=False).ids
    check(llama, "return")


def model(gemma: bool) -> bytes:
    """A tokenizer.model built as Llama 2's and Mistral's, or as Gemma's, with symbols of its own."""
    import sentencepiece

    out: Any = io.BytesIO()
    theirs = {
        True: {"pad_id": 0, "eos_id": 1, "bos_id": 2, "unk_id": 3, "bos_piece": "<bos>", "eos_piece": "<eos>",
               "user_defined_symbols": ["<start_of_turn>", "<end_of_turn>", "\n\n", "\n\n\n", "<table>"]},
        False: {"unk_id": 0, "bos_id": 1, "eos_id": 2, "pad_id": -1},
    }[gemma]  # fmt: skip
    trainer: Any = sentencepiece.SentencePieceTrainer
    trainer.train(sentence_iterator=iter((CODE + SCRIPTS).split("\n")), model_writer=out, model_type="bpe",
                  vocab_size=1500, byte_fallback=True, normalization_rule_name="identity", split_digits=True,
                  remove_extra_whitespaces=False, add_dummy_prefix=not gemma, character_coverage=0.99995,
                  allow_whitespace_only_pieces=True, hard_vocab_limit=False, minloglevel=2, **theirs)  # fmt: skip
    return out.getvalue()


@pytest.fixture(scope="module", params=[False, True], ids=["llama", "gemma"])
def shipped(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tokenizer.model alone."""
    folder = tmp_path_factory.mktemp("shipped")
    (folder / "tokenizer.model").write_bytes(model(request.param))
    return folder


def test_a_sentencepiece_model_gives_its_own_ids(shipped: Path):
    import sentencepiece

    tokenizer = load_tokenizer(shipped)
    assert isinstance(tokenizer, SentencePieceTokenizer) and not tokenizer.lossless
    library: Any = sentencepiece.SentencePieceProcessor(model_file=str(shipped / "tokenizer.model"))
    assert tokenizer.encode([HARD_SAMPLE])[0].tolist() == library.encode(HARD_SAMPLE)
    assert tokenizer.decode(tokenizer.encode([HARD_SAMPLE])[0]) == HARD_SAMPLE
    (inside,) = tokenizer.encode_inside(["return x"])
    assert b"".join(tokenizer.pieces[i] for i in inside) == b"return x"  # no space, as within a message
    assert marked(tokenizer, "return x", first=False) == inside.tolist()


def test_symbols_of_chats_are_ids_in_templates_and_text_in_messages(tmp_path: Path):
    (tmp_path / "tokenizer.model").write_bytes(model(gemma=True))
    tokenizer = load_tokenizer(tmp_path)
    turn, end = (tokenizer.specials[f"<{side}_of_turn>"] for side in ("start", "end"))
    assert end in tokenizer.end_ids
    text = "a <end_of_turn><table>\n\n"
    ids = tokenizer.encode([text])[0].tolist()
    assert end not in ids and tokenizer.decode(ids) == text
    assert marked(tokenizer, f"<start_of_turn>{text}")[0] == turn and end in marked(tokenizer, text)
    (tmp_path / "saved").mkdir()
    tokenizer.save(tmp_path / "saved")
    assert load_tokenizer(tmp_path / "saved").encode([text])[0].tolist() == ids


@pytest.mark.peers
@pytest.mark.parametrize("name", ADDED)
def test_ids_are_those_of_transformers(name: str):
    peer: Any = importlib.import_module("transformers").PreTrainedTokenizerFast(tokenizer_object=theirs(name))
    space = " " if name in ADD_SPACE else ""
    for text in (HARD_SAMPLE, MARKUP, CODE[:20_000]):
        plain = peer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        assert ours(name).encode([space + text])[0].tolist() == plain
        bos = ADDED[name][0][0]
        assert marked(ours(name), text) == peer(bos + text, add_special_tokens=False)["input_ids"][1:]


@pytest.mark.peers
def test_ids_of_a_sentencepiece_model_are_those_of_transformers(shipped: Path):
    transformers: Any = importlib.import_module("transformers")
    tokenizer: Any = load_tokenizer(shipped)
    kind: Any = transformers.LlamaTokenizer if "<s>" in tokenizer.specials else transformers.GemmaTokenizer
    peer = kind.from_pretrained(shipped)
    for text in (HARD_SAMPLE, CODE[:20_000]):
        expected = peer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        assert tokenizer.encode([text])[0].tolist() == expected


def test_a_folder_with_both_files_gives_the_one_that_is_asked_for(shipped: Path, tmp_path: Path):
    from configs.base import get_config
    from jaxlm.data.tokenizers import make_tokenizer

    data = get_config().data
    data.tokenizer_path = str(shipped)
    data.tokenizer = "hf"
    assert isinstance(make_tokenizer(data, list, list), SentencePieceTokenizer)
    (tmp_path / "tokenizer.model").write_bytes((shipped / "tokenizer.model").read_bytes())
    (tmp_path / "tokenizer.json").write_text(family("llama2"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": "x"}))
    data.tokenizer_path = str(tmp_path)
    kinds: list[tuple[Any, type]] = [("hf", HfTokenizer), ("sentencepiece", SentencePieceTokenizer)]
    for kind, expected in kinds:
        data.tokenizer = kind
        tokenizer = make_tokenizer(data, list, list)
        assert isinstance(tokenizer, expected) and list(tokenizer.beside) == ["tokenizer_config.json"]
        assert np.array_equal(tokenizer.encode(["a"])[0], load_tokenizer(
            tmp_path / ("tokenizer.json" if kind == "hf" else "tokenizer.model")).encode(["a"])[0])  # fmt: skip
