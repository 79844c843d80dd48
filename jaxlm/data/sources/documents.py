"""Documents, and the units and sources that yield them."""

import dataclasses
import hashlib
from collections.abc import Callable, Iterator
from typing import Any, Literal

Split = Literal["train", "val"]

BLOCK = 1 << 23  # bytes read at a time, and most characters tokenized at once


@dataclasses.dataclass(frozen=True)
class Document:
    """A document, or a part of one."""

    name: str
    text: str
    split: Split
    first: bool = True  # False: continues the document before it
    predicted: bool = True  # False: context that is not trained on, such as a prompt
    markup: tuple[tuple[int, int], ...] = ()  # characters [start, stop) from a chat template


@dataclasses.dataclass(frozen=True)
class Skipped:
    """A file or record that was left out because it is unusable."""

    reason: str


@dataclasses.dataclass(frozen=True)
class Unit:
    """The documents that one process reads; can be pickled."""

    read: Callable[[], Iterator[Document | Skipped]]


@dataclasses.dataclass(frozen=True)
class Source:
    name: str  # for messages
    key: dict[str, Any]  # JSON; everything that shapes the documents
    units: Callable[[], list[Unit]]
    num_bytes: int  # size of all documents; 0 = unknown
    masked: bool = False  # whether some of the text is not trained on
    skipped: int = 0  # number of files that were left out already
    files: frozenset[Any] = frozenset()  # all files that the source reads
    notes: tuple[str, ...] = ()  # lines to print


def held_out(name: str, val_fraction: float) -> bool:
    """Whether a document belongs to validation. Its name alone decides, so that other documents may come and go."""
    nth = round(1 / val_fraction)
    if abs(nth * val_fraction - 1) < 1e-9:  # a whole number, such as each 20th document
        return digest(name) % nth == 0
    return digest(name) % 2**32 < val_fraction * 2**32


def digest(name: str) -> int:
    return int(hashlib.sha1(name.encode("utf-8", "surrogatepass")).hexdigest(), 16)


def parts_of(text: str) -> Iterator[str]:
    """Yields a text in parts of at most BLOCK characters, which bounds what is tokenized at once."""
    while len(text) > BLOCK:
        cut = text.rfind("\n", 1, BLOCK)
        cut = cut if cut > 0 else BLOCK
        yield text[:cut]
        text = text[cut:]
    yield text
