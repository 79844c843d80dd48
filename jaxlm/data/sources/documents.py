"""Documents, and the units and sources that they come in."""

import dataclasses
import hashlib
from collections.abc import Callable, Iterator
from typing import Any, Literal

Split = Literal["train", "val"]

BLOCK = 1 << 23  # bytes read at a time, and characters tokenized as one


@dataclasses.dataclass(frozen=True)
class Document:
    """A document or a part of one."""

    name: str
    text: str
    split: Split
    first: bool = True  # False: goes on where the one before it stopped
    predicted: bool = True  # False: to be read, not to be learned, as a prompt is
    markup: tuple[tuple[int, int], ...] = ()  # characters [start, stop) that a chat template wrote


@dataclasses.dataclass(frozen=True)
class Skipped:
    """Something that is no good, and was left out."""

    reason: str


@dataclasses.dataclass(frozen=True)
class Unit:
    """What one process reads; can be pickled."""

    read: Callable[[], Iterator[Document | Skipped]]


@dataclasses.dataclass(frozen=True)
class Source:
    name: str  # for people
    key: dict[str, Any]  # JSON; all that shapes the documents
    units: Callable[[], list[Unit]]
    num_bytes: int  # of all documents; 0 = unknown
    masked: bool = False  # whether some of the text is not to be learned
    skipped: int = 0  # files that were left out already
    files: frozenset[Any] = frozenset()  # that it reads
    notes: tuple[str, ...] = ()  # lines for people


def held_out(name: str, val_fraction: float) -> bool:
    """Whether a document is one of validation: depends on its name alone, so that others may come and go."""
    nth = round(1 / val_fraction)
    if abs(nth * val_fraction - 1) < 1e-9:  # each 20th
        return digest(name) % nth == 0
    return digest(name) % 2**32 < val_fraction * 2**32


def digest(name: str) -> int:
    return int(hashlib.sha1(name.encode("utf-8", "surrogatepass")).hexdigest(), 16)


def parts_of(text: str) -> Iterator[str]:
    """A text in parts of at most BLOCK characters, so that no long one is tokenized at once."""
    while len(text) > BLOCK:
        cut = text.rfind("\n", 1, BLOCK)
        cut = cut if cut > 0 else BLOCK
        yield text[:cut]
        text = text[cut:]
    yield text
