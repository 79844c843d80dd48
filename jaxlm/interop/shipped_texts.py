"""Texts to ids and back as `transformers` does it with the tokenizer that a model ships.

jaxlm itself reads texts otherwise: it puts bos before each document, and takes the name of a special token in a text
for plain text. Scores of the same task are comparable only if the same ids are scored, so this file leaves all of it to
the shipped tokenizer.json. Other tokenizers have no counterpart there; with them, bos precedes each text.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tokenizers

from jaxlm.config import UserError
from jaxlm.data.prompts import for_chats
from jaxlm.data.sources.conversations import chat_text, template_of
from jaxlm.data.sources.documents import Document
from jaxlm.data.sources.jinja_templates import ChatTemplate
from jaxlm.data.tokenizers import shipped
from jaxlm.data.tokenizers.hf import FILE
from jaxlm.data.tokenizers.markup import encode_marked
from jaxlm.interop.exporting import special_ids
from jaxlm.run.open_run import Run

Message = dict[str, Any]


class ShippedTexts:
    """The tokenizer and the chat template of a run.

    Args:
      add_bos: whether texts begin with bos; None = as the tokenizer was shipped.
      prefix_id: stands before a text without a context; None = bos, or else the token that ends texts.

    Raises:
      UserError: the run has no tokenizer.
    """

    def __init__(self, run: Run, add_bos: bool | None = None, prefix_id: int | None = None):
        if run.tokenizer is None:
            raise UserError(f"{run.folder}: the run has no tokenizer, so its tokens are not text; allowed: another run")
        self._run, self._tokenizer, self._add_bos = run, run.tokenizer, add_bos
        self._library = _library(run.folder / "tokenizer" / FILE)
        names = shipped.token_names(self._tokenizer.beside)
        ids = {key: self._id(name) for key, name in names.items()}
        ends = special_ids(run)["eos_token_id"]
        ends = {ends} if isinstance(ends, int) else set(ends or self._tokenizer.end_ids)
        self.eos_id: int = _first(ids.get("eos_token"), min(ends))
        self.end_ids = ends | {self.eos_id}
        without = self.eos_id if "eos_token" in names else self._tokenizer.bos_id
        self.prefix_id: int = _first(prefix_id, ids.get("bos_token"), without)
        if not 0 <= self.prefix_id < run.vocab_size:
            raise UserError(f"prefix_token_id is {self.prefix_id}; allowed: 0 to {run.vocab_size - 1}")
        self._prefix = self.decode([self.prefix_id], specials=True)

    def encode(self, text: str, add_bos: bool | None = None) -> list[int]:
        """The ids of a text. With `add_bos` None, bos precedes it unless it begins with bos already."""
        if add_bos is None:
            add_bos = False if self._prefix and text.startswith(self._prefix) else self._add_bos
        if self._library is not None:
            text = text.encode("utf-8", "replace").decode()  # the library accepts no surrogates
            return self._library.encode(text, add_special_tokens=add_bos is not False).ids
        document = Document("", text, "val", markup=((0, len(text)),), shipped=True)
        ids = encode_marked(self._tokenizer, [document])[0].tolist()
        return ids if add_bos is False else [self._tokenizer.bos_id, *ids]

    def decode(self, ids: Sequence[int], specials: bool = False) -> str:
        """The text of ids, with the names of special tokens or without."""
        if self._library is not None:
            return self._library.decode(list(ids), skip_special_tokens=not specials)
        return self._tokenizer.decode(ids)

    def ends(self, stops: Sequence[str]) -> frozenset[int]:
        """The ids that end a continuation, those whose names are in `stops` included."""
        return frozenset(self.end_ids) | {i for s in stops if (i := self._tokenizer.specials.get(s)) is not None}

    def chat_template(self) -> str:
        """The source of the template. Raises UserError if the run has none."""
        template = self._template()
        return template.source if isinstance(template, ChatTemplate) else template

    def chat(self, messages: Sequence[Message], opening: bool) -> str:
        """The text of a conversation, which ends with the opening of the answer or, without `opening`, with the last
        message's content. Raises UserError if the run has no template, or if it refuses the messages.
        """
        return chat_text([dict(message) for message in messages], self._template(), opening)

    def _template(self) -> str | ChatTemplate:
        data = for_chats(self._tokenizer, self._run.config.data)
        template = template_of(data, self._tokenizer) if data else ""
        if not template:
            raise UserError(
                f"{self._run.folder}: the run has no chat template; allowed with one: runs with data.messages_key, or a"
                " pretrained tokenizer that came with a template"
            )
        return template

    def _id(self, name: str) -> int | None:
        return self._library.token_to_id(name) if self._library is not None else self._tokenizer.specials.get(name)


def _library(path: Path) -> tokenizers.Tokenizer | None:
    """The tokenizer of a tokenizer.json, which neither cuts nor pads texts here; None without the file."""
    if not path.is_file():
        return None
    library = tokenizers.Tokenizer.from_file(str(path))
    library.no_truncation()
    library.no_padding()
    return library


def _first(*found: int | None) -> int:
    return next(i for i in found if i is not None)
