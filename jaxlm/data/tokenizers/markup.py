"""Special tokens in texts: a name becomes its id in text that a chat template writes, and is plain text elsewhere."""

import itertools
import re
from collections.abc import Sequence

import numpy as np

from jaxlm.data.sources.documents import Spans
from jaxlm.data.tokenizers.base import Tokenizer


def encode_marked(tokenizer: Tokenizer, texts: Sequence[str], markup: Sequence[Spans]) -> list[np.ndarray]:
    """The int32 ids [n] of each text. A special token's name within one of the text's `markup` spans becomes its id.

    A text without such names is tokenized as a whole, by `Tokenizer.encode`.
    """
    names = _special_names(tokenizer)
    cut = [[text] if names is None else _cut(text, spans, names) for text, spans in zip(texts, markup, strict=True)]
    ids = iter(tokenizer.encode([part for parts in cut for part in parts[::2]]))
    encoded = []
    for parts in cut:
        found = [[tokenizer.specials[part]] if i % 2 else next(ids) for i, part in enumerate(parts)]
        encoded.append(found[0] if len(found) == 1 else np.concatenate(found).astype(np.int32))
    return encoded


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
