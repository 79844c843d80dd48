"""What a tokenizer is, and the two that need no library.

Every id stands for a fixed string of UTF-8 bytes (its piece), so decoding is a join, and the bytes of a text are
counted exactly from its ids. Lone surrogates, which UTF-8 proper has no bytes for, get three ("surrogatepass").
"""

import abc
import codecs
import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from jaxlm.config import DataConfig, UserError

SPEC = "jaxlm_tokenizer.json"  # in a saved folder: {"kind": ..., and what that kind needs}
UNKNOWN = "\ufffd".encode()

Texts = Callable[[], Iterable[str]]  # the documents, anew at each call


def to_bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


def code_points(text: str) -> np.ndarray:
    """uint32 [len(text)]."""
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4")


class Tokenizer(abc.ABC):
    """Ids 0 … vocab_size - 1, of which `bos_id` opens a document and stands for no text."""

    library: str | None = None  # the package that encodes, of which another version may give other ids
    num_threads: int  # that `encode` may use
    specials: dict[str, int]  # special tokens by name; `encode` never gives their ids (markup.py)
    end_ids: frozenset[int]  # at which a text ends: bos, and what else a pretrained model may end it with

    def __init__(self, pieces: list[bytes], bos_id: int):
        self.pieces = pieces
        self.bos_id = bos_id
        self.specials = {}
        self.end_ids = frozenset([bos_id])
        self.num_threads = os.cpu_count() or 1

    @property
    def vocab_size(self) -> int:
        return len(self.pieces)

    @abc.abstractmethod
    def encode(self, texts: list[str]) -> list[np.ndarray]:
        """int32 ids [n] of each text, without bos."""

    def decode(self, ids: Iterable[int] | np.ndarray) -> str:
        """The text that ids [n] stand for; bytes that are no UTF-8, as a model may sample, become U+FFFD."""
        ids = ids.tolist() if isinstance(ids, np.ndarray) else ids
        data = b"".join([self.pieces[i] for i in ids])
        try:
            return data.decode("utf-8", "surrogatepass")
        except UnicodeDecodeError:
            return data.decode("utf-8", "replace")

    def decoder(self) -> Callable[[Iterable[int], bool], str]:
        """Returns (ids, final) -> text, which decodes ids as they come. It holds back the bytes of a character that is
        not complete; with `final` they become U+FFFD.
        """
        decode = codecs.getincrementaldecoder("utf-8")("replace").decode
        return lambda ids, final: decode(b"".join([self.pieces[i] for i in ids]), final)

    def bytes_per_token(self) -> np.ndarray:
        """int32 [vocab_size]: UTF-8 bytes of the text each id stands for; they add up to those of an encoded text."""
        return np.array([len(piece) for piece in self.pieces], np.int32)

    @abc.abstractmethod
    def save(self, folder: Path) -> None:
        """Writes what `load` needs into a folder that exists, and there `SPEC`, a description with its `kind`."""

    @classmethod
    @abc.abstractmethod
    def load(cls, folder: Path, spec: dict[str, Any]) -> "Tokenizer":
        """What `save` wrote; `spec` is the description there.

        Raises:
          UserError, OSError, ValueError, KeyError, TypeError: it is not what `save` wrote.
        """

    @classmethod
    def corpus_key(cls, data: DataConfig) -> dict[str, Any] | None:
        """JSON of all that shapes one that is made of a corpus, besides the texts; None: no text shapes it."""
        return None

    @classmethod
    @abc.abstractmethod
    def make(cls, data: DataConfig, train_texts: Texts, all_texts: Texts, say: Callable[[str], None]) -> "Tokenizer":
        """The tokenizer of a corpus, given without and with its validation documents; `say` shows a line to people.

        Raises:
          UserError: the corpus is no good to make one.
        """


class ByteTokenizer(Tokenizer):
    """A token for each byte of UTF-8."""

    def __init__(self) -> None:
        super().__init__([*(bytes([i]) for i in range(256)), b""], bos_id=256)

    def encode(self, texts: list[str]) -> list[np.ndarray]:
        return [np.frombuffer(to_bytes(text), np.uint8).astype(np.int32) for text in texts]

    def save(self, folder: Path) -> None:
        write_spec(folder, {"kind": "bytes"})

    @classmethod
    def load(cls, folder: Path, spec: dict[str, Any]) -> "ByteTokenizer":
        return cls()

    @classmethod
    def make(
        cls, data: DataConfig, train_texts: Texts, all_texts: Texts, say: Callable[[str], None]
    ) -> "ByteTokenizer":
        return cls()


class CharTokenizer(Tokenizer):
    """A token for each character of an alphabet."""

    def __init__(self, alphabet: list[str]):
        self.alphabet = sorted(alphabet)
        super().__init__([*map(to_bytes, self.alphabet), b""], bos_id=len(alphabet))
        self._ids = np.full(0x110000, -1, np.int32)  # by code point
        self._ids[[ord(c) for c in self.alphabet]] = np.arange(len(alphabet))

    def encode(self, texts: list[str]) -> list[np.ndarray]:
        """Raises UserError where a character is not in the alphabet."""
        encoded = []
        for text in texts:
            ids = self._ids[code_points(text)]
            if ids.size and ids.min() < 0:
                c = text[int(np.argmin(ids))]
                raise UserError(
                    f"character {c!r} (U+{ord(c):04X}) is unknown to the tokenizer; "
                    f"allowed: its {len(self.alphabet)} characters (data.tokenizer=chars)"
                )
            encoded.append(ids)
        return encoded

    def save(self, folder: Path) -> None:
        write_spec(folder, {"kind": "chars", "alphabet": self.alphabet})

    @classmethod
    def load(cls, folder: Path, spec: dict[str, Any]) -> "CharTokenizer":
        return cls(spec["alphabet"])

    @classmethod
    def corpus_key(cls, data: DataConfig) -> dict[str, Any]:
        return {}

    @classmethod
    def make(
        cls, data: DataConfig, train_texts: Texts, all_texts: Texts, say: Callable[[str], None]
    ) -> "CharTokenizer":
        seen = np.zeros(0x110000, bool)
        for text in all_texts():
            seen[code_points(text)] = True
        return cls([chr(c) for c in np.flatnonzero(seen)])


def write_spec(folder: Path, spec: dict[str, Any]) -> None:
    (folder / SPEC).write_text(json.dumps(spec), "utf-8")  # ASCII: surrogates are escaped
