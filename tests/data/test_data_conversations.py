"""Fine-tuning records: which text is read, and which part of it is trained on."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jaxlm.config import Config, UserError
from jaxlm.config.validate import validate
from jaxlm.data import Corpus, Share, TrainOrder, eval_batches
from jaxlm.data.sources.conversations import conversation
from tests.corpora import make_config, open_corpus
from tests.runs import lines, run

TEMPLATE = "<|{role}|>\n{content}\n"


def turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


CHATS = [
    {
        "id": i,
        "chat": {
            "turns": [
                turn("system", "Be brief."),
                turn("user", f"What is {i} + {i}?"),
                turn("assistant", f"It is {2 * i}. é"),
                turn("user", "And doubled?"),
                turn("assistant", f"{4 * i}!"),
                turn("user", "Thanks"),
            ]
        },
    }
    for i in range(40)
]


def learned(i: int) -> list[str]:
    return [f"It is {2 * i}. é\n", f"{4 * i}!\n"]


def whole(i: int) -> str:
    turns = CHATS[i]["chat"]["turns"][:-1]  # nothing after the last answer is trained on
    return "".join(f"<|{t['role']}|>\n{t['content']}\n" for t in turns)


@pytest.fixture
def config(tmp_path: Path) -> Config:
    config = make_config(tmp_path)
    config.data.val_fraction = 0.1
    return config


def save(path: Path, records: list[Any]) -> Path:
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(records), path)
    else:
        path.write_text("".join(json.dumps(r) + "\n" for r in records))
    return path


def documents(corpus: Corpus, split: str) -> list[tuple[str, list[str]]]:
    """Returns the text of each document, and the parts of it that are trained on."""
    tokens, tokenizer = getattr(corpus, split), corpus.tokenizer
    assert tokenizer and tokens.masks is not None
    ids, mask = np.asarray(tokens), np.concatenate(tokens.masks)
    assert mask[ids == tokenizer.bos_id].all()  # a document's end is trained on
    found = []
    for part, is_learned in zip(np.split(ids, tokens.starts[1:]), np.split(mask, tokens.starts[1:]), strict=True):
        runs = np.flatnonzero(np.diff(is_learned, prepend=False, append=False)).reshape(-1, 2)
        found.append(
            (tokenizer.decode(part), [tokenizer.decode(part[a:b]) for a, b in runs if part[a] != 256 or b > a + 1])
        )
    return found


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_conversations_train_on_the_answers(config: Config, tmp_path: Path, kind: str):
    path = save(tmp_path / f"a.{kind}", CHATS)
    corpus = open_corpus(config, path, source=kind, messages_key="chat.turns", text_key="")
    validate(config)
    found = dict(documents(corpus, "train") + documents(corpus, "val"))
    assert found == {whole(i): learned(i) for i in range(40)}


@pytest.mark.parametrize("packing", ["concat", "document"])
def test_only_answers_are_targets(config: Config, tmp_path: Path, packing: Any):
    config.data.packing, config.seq_len, config.batch_size = packing, 256, 4
    corpus = open_corpus(config, save(tmp_path / "a.jsonl", CHATS), source="jsonl", messages_key="chat.turns")
    assert corpus.tokenizer
    answers = [text for _, texts in documents(corpus, "val") for text in texts]
    ends = 0
    targets: list[int] = []
    for _, _, batch in eval_batches(corpus, config, 4, share=Share(2)):
        y = batch["targets"].ravel()
        targets += y[y >= 0].tolist()
        after = batch["inputs"].ravel()
        ends += int(((y == 256) & (after != 256)).sum())
    assert sorted(corpus.tokenizer.decode(np.array(targets))) == sorted("".join(answers))
    count = len(documents(corpus, "val"))
    assert ends == (count if packing == "document" else count - 1)  # nothing follows the last document
    batch = TrainOrder(corpus, config).batches(0, 1)
    text = corpus.tokenizer.decode(batch["targets"][batch["targets"] >= 0])
    assert "It is " in text and "assistant" not in text and "What" not in text


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_records_of_sharegpt_are_the_same_conversations(config: Config, tmp_path: Path, kind: str):
    """Also in a table whose other rows have roles, where missing keys are null."""
    said = [("human", "q"), ("gpt", "a"), ("tool", "t"), ("gpt", "b")]
    named = [{"from": who, "value": text} for who, text in said]
    roles = [turn(role, text) for role, text in zip(("user", "assistant", "tool", "assistant"), "qatb", strict=True)]
    path = save(tmp_path / f"a.{kind}", [{"m": named if i % 2 else roles} for i in range(40)])
    corpus = open_corpus(config, path, source=kind, messages_key="m", text_key="")
    whole = "<|user|>\nq\n<|assistant|>\na\n<|tool|>\nt\n<|assistant|>\nb\n"
    assert documents(corpus, "train") == [(whole, ["a\n", "b\n"])] * corpus.facts["train"]["documents"]


RECORDS = [{"q": f"Name the number {i}", "a": {"text": f"number {i}"}} for i in range(40)]


@pytest.mark.parametrize("template", ["", TEMPLATE])
@pytest.mark.parametrize("prompt", ["q", ""])
def test_responses_are_trained_on_and_prompts_are_not(config: Config, tmp_path: Path, template: str, prompt: str):
    path = save(tmp_path / "a.jsonl", RECORDS)
    keys = {"response_key": "a.text", "prompt_key": prompt, "chat_template": template}
    corpus = open_corpus(config, path, source="jsonl", **keys)
    validate(config)
    asked = "<|user|>\nName the number 7\n<|assistant|>\n" if template else "Name the number 7"
    asked = asked if prompt else "<|assistant|>\n" * bool(template)
    answer = "number 7" + "\n" * bool(template)
    assert (asked + answer, [answer]) in documents(corpus, "train") + documents(corpus, "val")


def test_a_newline_that_a_shell_left_as_two_characters_is_refused(config: Config):
    config.data.source, config.data.path, config.data.messages_key = "jsonl", "a", "chat"
    validate(config)
    config.data.chat_template = config.data.chat_template.replace("\n", r"\n")
    with pytest.raises(UserError, match=r"^data\.chat_template is .*; allowed: newlines .* in a shell .*\$'"):
        validate(config)


def test_a_template_does_not_expand_placeholders_in_a_message():
    messages = [turn("user", "a {role} {content}"), turn("assistant", "b")]
    found = conversation(messages, "m", "[{role}] {content}</s>{role}")
    assert [(piece.text, piece.learned) for piece in found] == [
        ("[user] ", False),
        ("a {role} {content}</s>user", False),
        ("[assistant] ", False),
        ("b</s>assistant", True),
    ]


BAD = [
    ("hello", r"line 2: 'm' is str; allowed: a list of messages"),
    ([], r"line 2: 'm' has no message of role 'assistant'"),
    ([turn("user", "a")], r"line 2: 'm' has no message of role 'assistant'"),
    ([turn("user", "a"), {"role": "assistant"}], r"line 2: 'm' message 1 has no text 'content'"),
    ([{"from": "human", "value": "a"}], r"line 2: 'm' has no message of role 'assistant'"),
    ([{"from": "human", "text": "a"}], r"line 2: 'm' message 0 has no text 'content'"),
    ([turn("assistant", "a\0")], r"line 2: 'm' message 0 holds a NUL"),
    (["a"], r"line 2: 'm' message 0 has no text 'role'"),
]


@pytest.mark.parametrize("messages, words", BAD, ids=range(len(BAD)))
def test_bad_conversations_are_refused_or_skipped(config: Config, tmp_path: Path, messages: Any, words: str):
    good = [{"m": [turn("user", "a question"), turn("assistant", f"an answer {i}")]} for i in range(30)]
    path = save(tmp_path / "a.jsonl", [good[0], {"m": messages}, *good[1:]])
    with pytest.raises(UserError, match=words):
        open_corpus(config, path, source="jsonl", messages_key="m")
    assert open_corpus(config, path, on_error="skip").facts["skipped"] == 1


@pytest.mark.parametrize(
    "keys, words",
    [
        ({"prompt_key": "q"}, r"data\.response_key is ''"),
        ({"response_key": "a", "messages_key": "m"}, r"data\.messages_key is 'm'"),
        ({"messages_key": "m", "chat_template": "{role}"}, r"data\.chat_template is '\{role\}'"),
        ({"messages_key": "m", "chat_template": ""}, r"data\.chat_template is ''"),
        ({"messages_key": "m", "source": "text"}, r"data\.messages_key is 'm'; allowed: none with data\.source=text"),
    ],
)
def test_keys_that_do_not_go_together_are_refused(config: Config, keys: dict[str, str], words: str):
    config.data.source, config.data.path = "jsonl", "x"
    for key, value in keys.items():
        setattr(config.data, key, value)
    with pytest.raises(UserError, match=words):
        validate(config)


def test_a_run_learns_the_answers(tmp_path: Path):
    path = save(tmp_path / "a.jsonl", [{"m": [turn("user", str(i)), turn("assistant", "yes")]} for i in range(400)])
    keys = {"data.source": "jsonl", "data.path": path, "data.messages_key": "m", "data.tokenizer": "bytes",
            "data.packing": "document", "seq_len": 64, "steps": 150, "eval.sample_tokens": 0, "model.dropout": 0,
            "optim.ema_decay": 0, "optim.lr": 0.01}  # fmt: skip
    assert run(tmp_path / "run", **keys) == 0
    losses = [m["eval_loss"] for m in lines(tmp_path / "run") if "eval_loss" in m]
    assert losses[-1] < 0.05  # the questions are unpredictable, but do not count
