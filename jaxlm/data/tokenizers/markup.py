"""Special tokens in texts: a name becomes its id in text that a chat template writes, and is plain text elsewhere."""

import itertools
import re
from collections.abc import Sequence

import numpy as np

from jaxlm.data.sources.documents import Document, Spans
from jaxlm.data.tokenizers.base import Tokenizer


def encode_marked(tokenizer: Tokenizer, documents: Sequence[Document]) -> list[np.ndarray]:
    """The int32 ids [n] of each document or part of one. A special token's name within its `markup` becomes its id.

    A text without such names is tokenized as a whole, by `Tokenizer.encode`.
    """
    names = _special_names(tokenizer)
    cut = [[d.text] if names is None else _cut(d.text, d.markup, names) for d in documents]
    texts: list[str] = []
    inside: list[str] = []  # texts that continue others
    for document, parts in zip(documents, cut, strict=True):
        if document.shipped:
            parts[::2] = _as_shipped(tokenizer, parts, document.first)
        continues = document.shipped and not document.first
        inside += parts[:1] if continues else []
        texts += parts[2::2] if continues else parts[::2]
    ids, ids_inside = iter(tokenizer.encode(texts)), iter(tokenizer.encode_inside(inside))
    encoded = []
    for document, parts in zip(documents, cut, strict=True):
        first = next(ids_inside if document.shipped and not document.first else ids)
        found = [first] + [[tokenizer.specials[p]] if i % 2 else next(ids) for i, p in enumerate(parts[1:], 1)]
        encoded.append(found[0] if len(found) == 1 else np.concatenate(found).astype(np.int32))
    return encoded


def _as_shipped(tokenizer: Tokenizer, parts: list[str], first: bool) -> list[str]:
    """The texts among [text, name, text, ..., text] as the shipped tokenizer changes them: special tokens take the
    spaces beside them, and a space is put before a text that follows a special token or opens the document.
    """
    spaces, texts = tokenizer.spaces, []
    for i in range(0, len(parts), 2):
        text = parts[i]
        if i and parts[i - 1] in spaces.takes_after:
            text = text.lstrip()
        if i + 1 < len(parts) and parts[i + 1] in spaces.takes_before:
            text = text.rstrip()
        adds = spaces.adds == "always" or (spaces.adds == "missing" and not text.startswith(" "))
        texts.append(" " + text if text and adds and (i or first) else text)
    return texts


def first_special(tokenizer: Tokenizer, markup: str) -> int | None:
    """The id of the first special token in `markup`, a text that a template writes; None if there is none."""
    names = _special_names(tokenizer)
    found = names and names.search(markup)
    return tokenizer.specials[found[0]] if found else None


def _special_names(tokenizer: Tokenizer) -> re.Pattern[str] | None:
    names = sorted(tokenizer.specials, key=len, reverse=True)  # longest first, because one may begin with another
    return re.compile("|".join(map(re.escape, names))) if names else None


def _cut(text: str, spans: Spans, names: re.Pattern[str]) -> list[str]:
    """Cuts a text at the names in its spans: [text, name, text, ..., text]."""
    found = [match.span() for start, stop in spans for match in names.finditer(text, start, stop)]
    return [text[a:b] for a, b in itertools.pairwise([0, *itertools.chain.from_iterable(found), len(text)])]
