"""Turns prompts into ids and generated ids into text, piece by piece, up to where the text ends."""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from jaxlm.config import Config, DataConfig
from jaxlm.config.schema import OF_TOKENIZER
from jaxlm.data.sources.conversations import after_answer, question, trains_on_answers
from jaxlm.data.sources.documents import documents_of
from jaxlm.data.tokenizers import Tokenizer, shipped
from jaxlm.data.tokenizers.markup import encode_marked, first_special


class Ending(NamedTuple):
    """Where a continuation ends: at the first of these ids or texts, which is not shown."""

    ids: frozenset[int]
    texts: tuple[str, ...]
    tail: str  # text of the template after an answer; removed if the continuation ends with it


def for_chats(tokenizer: Tokenizer, data: DataConfig) -> DataConfig | None:
    """The configuration with which a run answers: its own if it trains on answers, or else the chat template that its
    pretrained tokenizer came with. None if there is none.
    """
    if trains_on_answers(data):
        return data
    if not shipped.chat_template(tokenizer.beside):
        return None
    return dataclasses.replace(data, messages_key="messages", chat_template=OF_TOKENIZER)


def encode_prompt(tokenizer: Tokenizer, data: DataConfig, text: str, chat: bool) -> np.ndarray:
    """Returns the ids (int32 [T]) to continue, the first of which is bos.

    Args:
      chat: whether to write the text as a message of the user, followed by the opening of the answer.

    Raises:
      UserError: the tokenizer has no ids for the text.
    """
    if not chat:
        return np.concatenate([[tokenizer.bos_id], tokenizer.encode([text])[0]]).astype(np.int32)
    pieces = question(text, data, tokenizer)
    ids = encode_marked(tokenizer, documents_of(pieces))
    return np.concatenate([[tokenizer.bos_id], *ids]).astype(np.int32)


class Start(NamedTuple):
    """What a model gets of a prompt."""

    ids: np.ndarray  # int32 [T]: what the decoder continues
    prompt: np.ndarray | None  # int32 [S]: what the encoder reads; None without an encoder


def start_of(config: Config, ids: np.ndarray) -> Start:
    """What the model of a run gets of the ids of a prompt: its decoder continues the last `seq_len`. An encoder reads
    the first `model.encoder_len`, and its decoder writes an answer from the beginning.
    """
    if config.model.encoder_layers:
        return Start(ids[:1], ids[: config.model.encoder_len])
    return Start(ids[-config.seq_len :], None)


def makes_answers(config: Config) -> bool:
    """Whether a run answers prompts, instead of continuing them."""
    return trains_on_answers(config.data) or config.model.encoder_layers > 0


def make_ending(tokenizer: Tokenizer, data: DataConfig, stops: Sequence[str] = ()) -> Ending:
    """Returns where a run's continuations end: at the end of the document, at `stops`, and, if the run trains on
    answers, after an answer.

    An answer ends at the first special token that the template writes after it. Without one, it ends where the user's
    next message opens.
    """
    after, opening = after_answer(data, tokenizer) if trains_on_answers(data) else ("", "")
    special = first_special(tokenizer, after)
    if special is not None:
        return Ending(tokenizer.end_ids | {special}, tuple(stops), "")
    return Ending(tokenizer.end_ids, (*stops, *([after + opening] if opening else [])), after)


class Continuation:
    """Decodes the text of one sample, piece by piece."""

    def __init__(self, tokenizer: Tokenizer, prompt: np.ndarray, ending: Ending):
        self.ended = False
        self._decode, self._ending, self._held = tokenizer.decoder(), ending, ""
        self._decode(prompt.tolist(), True)

    def add(self, ids: Iterable[int]) -> str:
        """Returns the text that new ids add. Text that may begin an ending is held back until it is decided."""
        if self.ended:
            return ""
        kept = []
        for i in ids:
            if i in self._ending.ids:
                return self._advance(kept) + self.finish()
            kept.append(i)
        return self._advance(kept)

    def finish(self) -> str:
        """Returns the rest of the text, when no more ids follow."""
        if self.ended:
            return ""
        text, self.ended = self._held + self._decode([], True), True
        return text.removesuffix(self._ending.tail)

    def _advance(self, ids: list[int]) -> str:
        text = self._held + self._decode(ids, False)
        found = [(at + len(stop), at) for stop in self._ending.texts if (at := text.find(stop)) >= 0]
        if found:  # the one that is complete first
            self.ended = True
            return text[: min(found)[1]]
        held = max((_overlap(text, end) for end in (*self._ending.texts, self._ending.tail)), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]


def _overlap(text: str, end: str) -> int:
    """Returns the length of the longest suffix of `text` that is a prefix of `end`."""
    return next((n for n in range(min(len(text), len(end)), 0, -1) if text.endswith(end[:n])), 0)
