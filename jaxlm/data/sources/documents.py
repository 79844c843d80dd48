"""Documents, the units that processes read them in, and sources, which list the units."""

import dataclasses
import hashlib
from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple

Split = Literal["train", "val"]

Spans = tuple[tuple[int, int], ...]  # [start, stop) each

BLOCK = 1 << 23  # bytes read at a time; characters tokenized as one text, at most


class TextPiece(NamedTuple):
    """A text that is tokenized as a whole; `learned` says whether it is trained on."""

    text: str
    learned: bool
    markup: Spans = ()  # characters that a chat template wrote: special tokens are recognized there
    shipped: bool = False  # whether special tokens change the spaces around them, as the tokenizer was shipped


@dataclasses.dataclass(frozen=True)
class Document:
    """A document or a part of a document."""

    name: str
    text: str
    split: Split
    first: bool = True  # False: continues the part before it
    predicted: bool = True  # whether it is trained on; False for a prompt, for example
    markup: Spans = ()  # characters that a chat template wrote
    shipped: bool = False  # whether special tokens change the spaces around them, as the tokenizer was shipped


def documents_of(pieces: list[TextPiece], name: str = "", split: Split = "train") -> list[Document]:
    """The parts of one document."""
    return [Document(name, p.text, split, i == 0, p.learned, p.markup, p.shipped) for i, p in enumerate(pieces)]


@dataclasses.dataclass(frozen=True)
class Skipped:
    """A file, a rest of a file or a record that was left out because it is unusable."""

    reason: str


@dataclasses.dataclass(frozen=True)
class Unit:
    """The documents that one process reads at a time; can be pickled."""

    read: Callable[[], Iterator[Document | Skipped]]


@dataclasses.dataclass(frozen=True)
class Source:
    name: str  # shown to people
    key: dict[str, Any]  # JSON: everything that determines the documents
    units: Callable[[], list[Unit]]
    num_bytes: int  # of all documents; 0 if unknown
    masked: bool = False  # whether some of the text is not trained on
    skipped: int = 0  # number of files already left out
    files: frozenset[Any] = frozenset()  # the files that it reads
    notes: tuple[str, ...] = ()  # lines to print


def held_out(name: str, val_fraction: float) -> bool:
    """Whether a document is held out for validation. Depends on its name alone, so that others may come and go."""
    nth = round(1 / val_fraction)
    if abs(nth * val_fraction - 1) < 1e-9:  # 1 / val_fraction is a whole number: one in `nth` is held out
        return digest(name) % nth == 0
    return digest(name) % 2**32 < val_fraction * 2**32


def digest(name: str) -> int:
    return int(hashlib.sha1(name.encode("utf-8", "surrogatepass")).hexdigest(), 16)


def parts_of(text: str) -> Iterator[str]:
    """Yields a text in parts of at most BLOCK characters, cut before newlines where possible."""
    while len(text) > BLOCK:
        cut = text.rfind("\n", 1, BLOCK)
        cut = cut if cut > 0 else BLOCK
        yield text[:cut]
        text = text[cut:]
    yield text
