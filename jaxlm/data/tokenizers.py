"""Text to token ids and back.

Every id stands for a fixed string of UTF-8 bytes (its piece), so decoding is a join, and the bytes of a text are
counted exactly from its ids. Lone surrogates, which UTF-8 proper has no bytes for, get three ("surrogatepass").
"""

import abc
import io
import itertools
import json
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from jaxlm.config import DataConfig, UserError

SAMPLE_CHARACTERS = 20_000_000  # of the training text, to train sentencepiece on
UNKNOWN = "\ufffd".encode()

# Newlines lead: a sentence is a line with the newlines before it, so "\n        return" may become one piece, and
# no piece has a newline after anything else. Text can therefore be cut before newlines without changing its ids.
SENTENCE = re.compile(r"\n*[^\n]{1,1000}|\n+")
CHUNK = re.compile(r"[\s\S]{0,999}[^\n](?=\n|\Z)|[\s\S]{1,1000}")
# sentencepiece writes a space as U+2581, and takes no surrogates: these characters go as bytes.
AS_BYTES = re.compile("([\u2581\ud800-\udfff]+)")
SPACES_AS_BYTES = re.compile("([ \u2581\ud800-\udfff]+)")  # for a model without a piece for spaces


def to_bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


class Tokenizer(abc.ABC):
    """Ids 0 … vocab_size - 1, of which `bos_id` opens a document and stands for no text."""

    def __init__(self, pieces: list[bytes], bos_id: int):
        self.pieces = pieces
        self.bos_id = bos_id

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

    def bytes_per_token(self) -> np.ndarray:
        """int32 [vocab_size]: UTF-8 bytes of the text each id stands for; they add up to those of an encoded text."""
        return np.array([len(piece) for piece in self.pieces], np.int32)

    @abc.abstractmethod
    def save(self, folder: Path) -> None:
        """Writes what `load_tokenizer` needs into a folder that exists."""


class ByteTokenizer(Tokenizer):
    """A token for each byte of UTF-8."""

    def __init__(self) -> None:
        super().__init__([*(bytes([i]) for i in range(256)), b""], bos_id=256)

    def encode(self, texts: list[str]) -> list[np.ndarray]:
        return [np.frombuffer(to_bytes(text), np.uint8).astype(np.int32) for text in texts]

    def save(self, folder: Path) -> None:
        _write_json(folder, {"kind": "bytes"})


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
                raise UserError(f"character {c!r} (U+{ord(c):04X}) is unknown to the tokenizer; "
                                f"allowed: its {len(self.alphabet)} characters (data.tokenizer=chars)")  # fmt: skip
            encoded.append(ids)
        return encoded

    def save(self, folder: Path) -> None:
        _write_json(folder, {"kind": "chars", "alphabet": self.alphabet})


def _library() -> Any:
    """sentencepiece, whose functions are made at run time, where no type checker sees them."""
    import sentencepiece

    return sentencepiece


class SentencePieceTokenizer(Tokenizer):
    """A sentencepiece model; lossless where `train_sentencepiece` made it."""

    def __init__(self, model: bytes, lossless: bool, name: str):
        """`name` is what errors call the model.

        Raises:
          UserError: it is no sentencepiece model, or has no bos.
        """
        try:
            self._processor = _library().SentencePieceProcessor(model_proto=model)
        except (RuntimeError, OSError, ValueError) as error:
            raise UserError(f"{name}: not a sentencepiece model") from error
        sp = self._processor
        if sp.bos_id() < 0:
            raise UserError(f"{name}: the model has no bos piece; allowed: one trained with bos_id >= 0")
        super().__init__([_piece_bytes(sp, i) for i in range(sp.vocab_size())], sp.bos_id())
        self._model = model
        self._lossless = lossless
        self._byte_ids = [sp.piece_to_id(f"<0x{i:02X}>") for i in range(256)] if lossless else []
        self._as_bytes = SPACES_AS_BYTES if sp.is_unknown(sp.piece_to_id("\u2581")) else AS_BYTES
        # Models made elsewhere mostly put a space before the text; it is no part of it.
        self._adds_space = not lossless and self.pieces[sp.encode("a")[0]].startswith(b" ")

    def encode(self, texts: list[str]) -> list[np.ndarray]:
        if not self._lossless:  # may normalize and add a space, so whole texts only
            texts = [to_bytes(text).decode("utf-8", "replace") for text in texts]
            return [np.array(ids, np.int32) for ids in self._processor.encode(texts)]
        chunks, ends = [], []
        for text in texts:
            for i, part in enumerate(self._as_bytes.split(text)):
                chunks += [part] if i % 2 else CHUNK.findall(part)
            ends.append(len(chunks))
        special = {i: [self._byte_ids[b] for b in to_bytes(c)] for i, c in enumerate(chunks) if self._as_bytes.match(c)}
        ids = self._processor.encode(["" if i in special else c for i, c in enumerate(chunks)])
        for i, byte_ids in special.items():
            ids[i] = byte_ids
        spans = itertools.pairwise([0, *ends])
        return [np.fromiter(itertools.chain.from_iterable(ids[a:b]), np.int32) for a, b in spans]

    def decode(self, ids: Iterable[int] | np.ndarray) -> str:
        text = super().decode(ids)
        return text.removeprefix(" ") if self._adds_space else text

    def save(self, folder: Path) -> None:
        (folder / "sentencepiece.model").write_bytes(self._model)
        _write_json(folder, {"kind": "sentencepiece", "lossless": self._lossless})


def _piece_bytes(sp: Any, i: int) -> bytes:
    if sp.is_control(i) or sp.is_unused(i):
        return b""
    if sp.is_unknown(i):
        return UNKNOWN
    piece = sp.id_to_piece(i)
    return bytes([int(piece[3:5], 16)]) if sp.is_byte(i) else to_bytes(piece.replace("\u2581", " "))


def code_points(text: str) -> np.ndarray:
    """uint32 [len(text)]."""
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4")


Texts = Callable[[], Iterable[str]]  # the documents, anew at each call


def make_tokenizer(data: DataConfig, train_texts: Texts, all_texts: Texts) -> Tokenizer:
    """The tokenizer that `data.tokenizer` names, loaded or trained.

    Args:
      train_texts, all_texts: the corpus without and with its validation documents.

    Raises:
      UserError: the model cannot be loaded, or the corpus is no good to train one.
    """
    if data.tokenizer_path:
        return load_tokenizer(data.tokenizer_path)
    if data.tokenizer == "bytes":
        return ByteTokenizer()
    if data.tokenizer == "chars":
        seen = np.zeros(0x110000, bool)
        for text in all_texts():
            seen[code_points(text)] = True
        return CharTokenizer([chr(c) for c in np.flatnonzero(seen)])
    sample = spread_sample((c for text in train_texts() for c in CHUNK.findall(text)), SAMPLE_CHARACTERS)
    return SentencePieceTokenizer(train_sentencepiece(sample, data.vocab_size), lossless=True, name="trained model")


def spread_sample(chunks: Iterable[str], limit: int) -> list[str]:
    """Every k-th of the chunks, with k the smallest power of two that keeps them to `limit` characters."""
    kept: list[str] = []
    size, k = 0, 1
    for i, chunk in enumerate(chunks):
        if i % k == 0:
            kept.append(chunk)
            size += len(chunk)
        while size > limit and len(kept) > 1:
            kept, k = kept[::2], 2 * k
            size = sum(map(len, kept))
    return kept


def train_sentencepiece(texts: list[str], vocab_size: int) -> bytes:
    """A lossless BPE model with at most `vocab_size` pieces; the same bytes on every machine.

    Pieces may hold several words ("self." or "\\n        return"): on Python source with 2048 pieces that gives 3.23
    bytes a token, where splitting at spaces gives 2.90.

    Raises:
      UserError: the text does not do for a model of that size.
    """
    sentencepiece = _library()

    def train(texts: Iterable[str], coverage: float) -> bytes:
        model = io.BytesIO()
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=(s for text in texts for s in SENTENCE.findall(AS_BYTES.sub("\n", text))),
            model_writer=model, model_type="bpe", vocab_size=vocab_size, hard_vocab_limit=False,
            character_coverage=coverage, byte_fallback=True,
            normalization_rule_name="identity", remove_extra_whitespaces=False, add_dummy_prefix=False,
            split_by_whitespace=False, split_by_unicode_script=False, allow_whitespace_only_pieces=True,
            max_sentencepiece_length=32, bos_id=0, unk_id=1, eos_id=-1, pad_id=-1,
            num_threads=1, minloglevel=2)  # fmt: skip
        return model.getvalue()

    try:
        try:
            return train(texts, coverage=0.9995)  # the rarest characters are left to byte pieces
        except RuntimeError as error:
            if "required_chars" not in str(error):
                raise
            return train(_without_rare_characters(texts, (vocab_size - 258) // 2), coverage=1.0)
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise UserError(f"data.vocab_size is {vocab_size}: no sentencepiece model of this text ({reason})") from error


def _without_rare_characters(texts: list[str], keep: int) -> Iterator[str]:
    """The texts with all but the `keep` most frequent characters replaced by newlines."""
    counts = np.zeros(0x110000, np.int64)
    for text in texts:
        np.add.at(counts, code_points(text), 1)
    rare = set(np.flatnonzero(counts)) - set(np.argsort(-counts, kind="stable")[: max(keep, 0)])
    table = dict.fromkeys(map(int, rare), "\n")
    return (text.translate(table) for text in texts)


def load_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer in a folder that `save` wrote, or a sentencepiece model file.

    Raises:
      UserError: there is none, or it is unusable.
    """
    path = Path(path).expanduser()
    if path.name == "sentencepiece.model" and (path.parent / "tokenizer.json").is_file():
        path = path.parent
    if path.is_file():
        return SentencePieceTokenizer(path.read_bytes(), lossless=False, name=str(path))
    try:
        spec = json.loads((path / "tokenizer.json").read_text("utf-8"))
        if spec["kind"] == "bytes":
            return ByteTokenizer()
        if spec["kind"] == "chars":
            return CharTokenizer(spec["alphabet"])
        if spec["kind"] == "sentencepiece":
            model = path / "sentencepiece.model"
            return SentencePieceTokenizer(model.read_bytes(), spec["lossless"], str(model))
    except FileNotFoundError as error:
        raise UserError(f"{error.filename}: no such file; allowed: a tokenizer folder or a .model file") from None
    except UserError:
        raise
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path / 'tokenizer.json'}: unreadable ({error})") from error
    raise UserError(f"{path / 'tokenizer.json'}: kind is {spec['kind']!r}; allowed: bytes, chars, sentencepiece")


def _write_json(folder: Path, spec: dict[str, Any]) -> None:
    (folder / "tokenizer.json").write_text(json.dumps(spec), "utf-8")  # ASCII: surrogates are escaped
