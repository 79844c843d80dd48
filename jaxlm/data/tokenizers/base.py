"""The base class of tokenizers, and the two tokenizers that need no library.

Every id stands for a fixed string of bytes, its piece. Decoding therefore joins pieces, and the UTF-8 bytes of a text
can be counted exactly from its ids. A lone surrogate, which strict UTF-8 cannot encode, has three bytes
("surrogatepass").
"""

import abc
import codecs
import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from jaxlm.config import DataConfig, UserError

SPEC = "jaxlm_tokenizer.json"  # in a saved folder: {"kind": ..., and the data of that kind}
UNKNOWN = "\ufffd".encode()

Texts = Callable[[], Iterable[str]]  # each call iterates over the documents anew


def to_bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


def code_points(text: str) -> np.ndarray:
    """uint32 [len(text)]: the code points of a text."""
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4")


class Spaces(NamedTuple):
    """How special tokens of a tokenizer, as it was shipped, change the spaces around them."""

    takes_after: frozenset[str] = frozenset()  # tokens that take the spaces after them
    takes_before: frozenset[str] = frozenset()
    # Whether a space is put before a text that follows a special token; `missing`: if it does not begin with one.
    adds: Literal["never", "always", "missing"] = "never"


class Tokenizer(abc.ABC):
    """Maps text to ids 0 … vocab_size - 1 and back. The id `bos_id` opens a document and stands for no text."""

    library: str | None = None  # the package that encodes; another version may give other ids
    num_threads: int  # threads that `encode` may use
    specials: dict[str, int]  # special tokens by name; `encode` never gives their ids (markup.py)
    spaces: Spaces = Spaces()  # `encode` does nothing of it; markup.py does, in what a Jinja template writes
    beside: dict[str, bytes]  # files that its model ships beside it, such as its chat template (shipped.py)
    end_ids: frozenset[int]  # ids that end a text: bos, and other ends that a pretrained model may write

    def __init__(self, pieces: list[bytes], bos_id: int):
        self.pieces = pieces
        self.bos_id = bos_id
        self.specials = {}
        self.beside = {}
        self.end_ids = frozenset([bos_id])
        self.num_threads = os.cpu_count() or 1

    @property
    def vocab_size(self) -> int:
        return len(self.pieces)

    @abc.abstractmethod
    def encode(self, texts: list[str]) -> list[np.ndarray]:
        """The int32 ids [n] of each text, without bos."""

    def encode_inside(self, texts: list[str]) -> list[np.ndarray]:
        """The ids of texts that continue others: without what `encode` may put before a text."""
        return self.encode(texts)

    def decode(self, ids: Iterable[int] | np.ndarray) -> str:
        """The text that ids [n] stand for. Bytes that are not UTF-8, which a model may sample, become U+FFFD."""
        ids = ids.tolist() if isinstance(ids, np.ndarray) else ids
        data = b"".join([self.pieces[i] for i in ids])
        try:
            return data.decode("utf-8", "surrogatepass")
        except UnicodeDecodeError:
            return data.decode("utf-8", "replace")

    def decoder(self) -> Callable[[Iterable[int], bool], str]:
        """Returns a function (ids, final) -> text, which decodes a stream of ids. It holds back the bytes of an
        incomplete character until the rest comes; with `final`, they become U+FFFD.
        """
        decode = codecs.getincrementaldecoder("utf-8")("replace").decode
        return lambda ids, final: decode(b"".join([self.pieces[i] for i in ids]), final)

    def bytes_per_token(self) -> np.ndarray:
        """int32 [vocab_size]: bytes that each id stands for. Summed over a text's ids, they are its UTF-8 bytes."""
        return np.array([len(piece) for piece in self.pieces], np.int32)

    @abc.abstractmethod
    def save(self, folder: Path) -> None:
        """Writes the files that `load` needs to an existing folder. One is `SPEC`, which holds the `kind`."""

    @classmethod
    @abc.abstractmethod
    def load(cls, folder: Path, spec: dict[str, Any]) -> "Tokenizer":
        """Loads a tokenizer that `save` wrote; `spec` is the content of the folder's `SPEC`.

        Raises:
          UserError, OSError, ValueError, KeyError, TypeError: the files are not as `save` writes them.
        """

    @classmethod
    def corpus_key(cls, data: DataConfig) -> dict[str, Any] | None:
        """JSON: everything besides the texts that determines the tokenizer of a corpus; None if texts do not matter."""
        return None

    @classmethod
    @abc.abstractmethod
    def make(cls, data: DataConfig, train_texts: Texts, all_texts: Texts, say: Callable[[str], None]) -> "Tokenizer":
        """Makes the tokenizer of a corpus.

        Args:
          train_texts, all_texts: the corpus without and with its validation documents.
          say: shows a line to people.

        Raises:
          UserError: no tokenizer can be made from the corpus.
        """


class ByteTokenizer(Tokenizer):
    """One token per byte of UTF-8."""

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
    """One token per character of an alphabet."""

    def __init__(self, alphabet: list[str]):
        self.alphabet = sorted(alphabet)
        super().__init__([*map(to_bytes, self.alphabet), b""], bos_id=len(alphabet))
        self._ids = np.full(0x110000, -1, np.int32)  # by code point
        self._ids[[ord(c) for c in self.alphabet]] = np.arange(len(alphabet))

    def encode(self, texts: list[str]) -> list[np.ndarray]:
        """The int32 ids of each text. Raises UserError if a character is not in the alphabet."""
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
