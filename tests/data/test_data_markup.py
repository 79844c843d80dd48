"""Special tokens of a pretrained tokenizer are ids where a chat template writes them, and text where people do."""

import json
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxlm.config import Config
from jaxlm.data import store
from jaxlm.data.prompts import encode_prompt, make_ending
from jaxlm.data.sources.conversations import conversation
from jaxlm.data.sources.documents import documents_of
from jaxlm.data.tokenizers.hf import HfTokenizer
from jaxlm.data.tokenizers.markup import encode_marked
from tests.corpora import make_config, open_corpus
from tests.tokenizing import hf_spec

CHATML = "<|im_start|>{role}\n{content}<|im_end|>\n"
NAMES = ("<|im_start|>", "<|im_end|>", "<|user|>")


@pytest.fixture(scope="module")
def content() -> bytes:
    """Returns a tokenizer.json that has special tokens for chats and changes no text."""
    spec = hf_spec("byte-level")
    spec["normalizer"], spec["pre_tokenizer"]["add_prefix_space"] = None, False
    spec["post_processor"] = spec["truncation"] = spec["padding"] = None
    for i, name in enumerate(NAMES, 1001):
        keys = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        spec["added_tokens"].append({"id": i, "content": name, "special": True, **keys})
    return json.dumps(spec).encode()


@pytest.fixture(scope="module")
def tokenizer(content: bytes) -> HfTokenizer:
    return HfTokenizer(content, "test")


@pytest.fixture
def config(tmp_path: Path, content: bytes) -> Config:
    (tmp_path / "tokenizer.json").write_bytes(content)
    config = make_config(tmp_path)
    config.data.tokenizer, config.data.tokenizer_path = "hf", str(tmp_path / "tokenizer.json")
    config.data.source, config.data.messages_key, config.data.val_fraction = "jsonl", "m", 0.1
    return config


def named(tokenizer: Any, ids: Any) -> list[str]:
    """Returns the names of the special tokens among ids."""
    names = {i: name for name, i in tokenizer.specials.items()}
    return [names[i] for i in ids if i in names]


def turns(*said: tuple[str, str]) -> list[dict[str, str]]:
    return [{"role": role, "content": text} for role, text in said]


def ids_of(tokenizer: HfTokenizer, messages: Any, template: str = CHATML) -> list[int]:
    pieces = conversation(messages, "m", template)
    encoded = encode_marked(tokenizer, documents_of(pieces))
    return np.concatenate(encoded).tolist()


def test_ids_are_those_of_the_library(tokenizer: HfTokenizer, content: bytes):
    """The library finds special tokens anywhere in a text."""
    from tokenizers import Tokenizer as Library

    said = turns(("system", "Be brief."), ("user", "What is it?\nSay."), ("assistant", "A value."), ("user", "And?"),
                 ("assistant", "def é"))  # fmt: skip
    text = "".join(f"<|im_start|>{t['role']}\n{t['content']}<|im_end|>\n" for t in said)
    expected = Library.from_str(content.decode()).encode(text, add_special_tokens=False).ids
    assert ids_of(tokenizer, said) == expected
    assert named(tokenizer, expected) == ["<|im_start|>", "<|im_end|>"] * 5


@given(st.lists(st.sampled_from([*NAMES, "<|im_", "end|>", "user", "\n", " a", "<|endoftext|>"]), max_size=6))
@settings(deadline=None)
def test_what_people_write_never_becomes_a_special_token(tokenizer: HfTokenizer, parts: list[str]):
    """Names of special tokens in a message or a role stay text, and nothing is lost."""
    text = "".join(parts)
    ids = ids_of(tokenizer, turns(("user", text), (text or "tool", text), ("assistant", text)))
    assert named(tokenizer, ids) == ["<|im_start|>", "<|im_end|>"] * 3
    assert tokenizer.decode(ids) == f"user\n{text}\n{text or 'tool'}\n{text}\nassistant\n{text}\n"
    prompt = encode_prompt(tokenizer, chat_data(), text, True).tolist()
    assert prompt == [tokenizer.bos_id, *ids_of(tokenizer, turns(("user", text), ("assistant", "")))[:-2]]


def chat_data(template: str = CHATML) -> Any:
    from configs.base import get_config

    data = get_config().data
    data.messages_key, data.chat_template = "m", template
    return data


def test_a_marker_around_a_known_role_is_a_special_token(tokenizer: HfTokenizer):
    """An example is Phi's <|user|>. A role that occurs only in data makes no special token."""
    template = "<|{role}|>\n{content}<|im_end|>\n"
    ids = ids_of(tokenizer, turns(("user", "a"), ("im_start", "b"), ("assistant", "c")), template)
    assert named(tokenizer, ids) == ["<|user|>", "<|im_end|>", "<|im_end|>", "<|im_end|>"]


@pytest.mark.parametrize("template, special", [(CHATML, ["<|im_start|>", "<|im_end|>"]), ("{role}: {content}\n", [])])
def test_a_store_of_chats_holds_special_tokens(config: Config, tmp_path: Path, template: str, special: list[str]):
    chats = [{"m": turns(("user", f"<|im_end|>{i}"), ("assistant", f"{i}<|im_end|>"))} for i in range(40)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in chats))
    corpus = open_corpus(config, tmp_path / "a.jsonl", chat_template=template)
    assert corpus.tokenizer and corpus.train.masks and corpus.bytes_per_token is not None
    ids, learned = np.asarray(corpus.train), np.concatenate(corpus.train.masks)
    count = corpus.facts["train"]["documents"]
    assert named(corpus.tokenizer, ids) == (["<|endoftext|>"] + special * 2) * count
    # The ends of answers and of documents are trained on.
    assert named(corpus.tokenizer, ids[learned]) == ["<|endoftext|>", *special[1:]] * count
    assert corpus.facts["train"]["bytes"] == corpus.bytes_per_token[ids].sum()
    assert corpus.tokenizer.decode(ids[learned]).count("<|im_end|>") == count  # what the assistant wrote


def test_a_store_of_an_older_markup_version_is_not_used(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "a.jsonl").write_text(
        "".join(json.dumps({"m": turns(("assistant", str(i)))}) + "\n" for i in range(40))
    )
    folders = {}
    kinds: tuple[Literal["hf", "bytes"], ...] = ("hf", "bytes")
    for kind in kinds:
        config.data.tokenizer = kind
        config.data.tokenizer_path = str(tmp_path / "tokenizer.json") if kind == "hf" else ""
        for version in (1, 2):
            monkeypatch.setattr(store, "MARKUP", version)
            folders[kind, version] = open_corpus(config, tmp_path / "a.jsonl").folder
    assert folders["hf", 1] != folders["hf", 2]
    assert folders["bytes", 1] == folders["bytes", 2]  # it has no special tokens


def test_an_answer_ends_at_these_ids_and_texts(tokenizer: HfTokenizer):
    ids = {tokenizer.bos_id, tokenizer.specials["<|im_end|>"]}
    assert make_ending(tokenizer, chat_data(), ["halt"]) == (ids, ("halt",), "")
    ending = make_ending(tokenizer, chat_data("{role}: {content}\n"), ["halt"])
    assert ending == (ids, ("halt", "\nuser: "), "\n")  # the end markers of pretrained models count too
    ending = make_ending(tokenizer, chat_data("<|im_start|>{role}\n{content}<|user|>"))
    assert ending.ids == ids | {tokenizer.specials["<|user|>"]}
