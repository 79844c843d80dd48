"""sentencepiece tokenizers: lossless models trained on the corpus, and models made elsewhere."""

import importlib
import importlib.metadata
import itertools
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from jaxlm.config import DataConfig, UserError
from jaxlm.data.tokenizers.base import UNKNOWN, Texts, Tokenizer, to_bytes, write_spec
from jaxlm.data.tokenizers.hf import ENDS
from jaxlm.data.tokenizers.sentencepiece_training import (
    AS_BYTES,
    CHUNK,
    SCORES_PER_NAT,
    sample_characters,
    sentencepiece_library,
    spread_sample,
    train_sentencepiece,
)
from jaxlm.data.tokenizers.shipped import write_beside

LINE = re.compile(r"\n*[^\n]+|\n+")
MAX_LINE = 1000  # characters; longer lines are cut, because encoding time grows faster than the length
SPACES_AS_BYTES = re.compile("([ \u2581\ud800-\udfff]+)")  # for a model without a piece for spaces

TURNS = ("<start_of_turn>",)  # symbols that open messages


class SentencePieceTokenizer(Tokenizer):
    """A sentencepiece model; lossless if `train_sentencepiece` made it."""

    library = "sentencepiece"

    def __init__(self, model: bytes, lossless: bool, name: str):
        """Loads the bytes of a `model`; errors call it `name`.

        Raises:
          UserError: the bytes are not a sentencepiece model, or it has no bos.
        """
        try:
            sp = self.processor = sentencepiece_library().SentencePieceProcessor(model_proto=model)
            pieces = [_piece_bytes(sp, i) for i in range(sp.vocab_size())]
            first = pieces[sp.encode("a")[0]]
        except (RuntimeError, OSError, ValueError, IndexError) as error:
            raise UserError(f"{name}: not a sentencepiece model") from error
        if sp.bos_id() < 0:
            raise UserError(f"{name}: the model has no bos piece; allowed: one trained with bos_id >= 0")
        super().__init__(pieces, sp.bos_id())
        self.end_ids |= {sp.eos_id()} - {-1}
        self._names = re.compile(r"(?!)")
        if not lossless:
            self._find_specials()
        self._model = model
        self.lossless = lossless
        self._byte_ids = [sp.piece_to_id(f"<0x{i:02X}>") for i in range(256)] if lossless else []
        self._as_bytes = SPACES_AS_BYTES if sp.is_unknown(sp.piece_to_id("\u2581")) else AS_BYTES
        # Most models made elsewhere put a space before the text; decoding removes it.
        self._adds_space = not lossless and first.startswith(b" ")

    def _find_specials(self) -> None:
        """Control pieces, and symbols of chats (Gemma's <end_of_turn>), which the library would find in any text."""
        sp = self.processor
        for name in (sp.id_to_piece(i) for i in range(sp.vocab_size()) if sp.is_control(i)):
            self.specials[name] = sp.piece_to_id(name)
        symbols = [name for name in (*ENDS, *TURNS) if not sp.is_unknown(sp.piece_to_id(name))]
        self.specials |= {name: sp.piece_to_id(name) for name in symbols}
        self.end_ids |= {self.specials[name] for name in ENDS if name in self.specials}
        if symbols := [name for name in symbols if not sp.is_control(self.specials[name])]:
            self._names = re.compile(f"(?=(?:{'|'.join(map(re.escape, symbols))}))")
            for name in symbols:
                self.pieces[self.specials[name]] = b""

    def encode(self, texts: list[str]) -> list[np.ndarray]:
        if not self.lossless:  # the model may normalize and add a space, so texts cannot be cut
            texts = [to_bytes(text).decode("utf-8", "replace") for text in texts]
            encoded = self.processor.encode(texts, num_threads=self.num_threads)
            return [
                self._encode_names(text) if self._names.search(text) else np.array(ids, np.int32)
                for text, ids in zip(texts, encoded, strict=True)
            ]
        lines: list[str] = []
        ends = [0]
        ids: dict[str, list[int]] = {}  # the ids of a line, or of characters encoded as bytes
        for text in texts:
            if self._as_bytes is AS_BYTES and not _has_any_as_bytes(text):
                lines += _lines(text)
            else:
                for i, part in enumerate(self._as_bytes.split(text)):
                    if i % 2:
                        ids[part] = [self._byte_ids[b] for b in to_bytes(part)]
                        lines.append(part)
                    else:
                        lines += _lines(part)
            ends.append(len(lines))
        # A third of the lines of code are repeated ("\n        else:"); the library encodes each of them once.
        new = dict.fromkeys(lines)
        if ids or len(new) < 0.8 * len(lines):
            new = [line for line in new if line not in ids]
            ids |= zip(new, self.processor.encode(new, num_threads=self.num_threads), strict=True)
            encoded = list(map(ids.__getitem__, lines))
        else:  # few repeated lines, as in prose: a lookup per line would cost more than it saves
            encoded = self.processor.encode(lines, num_threads=self.num_threads)
        spans = itertools.pairwise(ends)
        return [np.fromiter(itertools.chain.from_iterable(encoded[a:b]), np.int32) for a, b in spans]

    def _encode_names(self, text: str) -> np.ndarray:
        """The ids of a text that holds names of symbols, as plain text: the names are cut in two."""
        cuts = [match.start() + 1 for match in self._names.finditer(text)]
        first, *rest = [text[a:b] for a, b in itertools.pairwise([0, *cuts, len(text)])]
        return np.concatenate([*self.encode([first]), *self.encode_inside(rest)]).astype(np.int32)

    def encode_inside(self, texts: list[str]) -> list[np.ndarray]:
        if not self._adds_space:
            return self.encode(texts)
        # No piece holds U+FDD0, so the ids behind it are those of the text alone.
        skip = len(self.encode(["\ufdd0"])[0])
        return [ids[skip:] for ids in self.encode(["\ufdd0" + text for text in texts])]

    def decode(self, ids: Iterable[int] | np.ndarray) -> str:
        text = super().decode(ids)
        return text.removeprefix(" ") if self._adds_space else text

    def decoder(self) -> Callable[[Iterable[int], bool], str]:
        decode, begun = super().decoder(), not self._adds_space

        def part(ids: Iterable[int], final: bool) -> str:
            nonlocal begun
            text = decode(ids, final)
            text, begun = text if begun else text.removeprefix(" "), begun or bool(text)
            return text

        return part

    def save(self, folder: Path) -> None:
        (folder / "sentencepiece.model").write_bytes(self._model)
        write_beside(folder, self.beside)
        write_spec(folder, {"kind": "sentencepiece", "lossless": self.lossless})

    @classmethod
    def load(cls, folder: Path, spec: dict[str, Any]) -> "SentencePieceTokenizer":
        model = folder / "sentencepiece.model"
        return cls(model.read_bytes(), spec["lossless"], str(model))

    @classmethod
    def corpus_key(cls, data: DataConfig) -> dict[str, Any]:
        version = importlib.metadata.version("sentencepiece")
        key = {"model": data.sentencepiece, "vocab_size": data.vocab_size, "version": version}
        if data.sentencepiece == "unigram":  # for BPE, SHAPE in store.py holds it
            key |= {"sample": sample_characters(data.sentencepiece, data.vocab_size), "scores": SCORES_PER_NAT}
        return key

    @classmethod
    def make(
        cls, data: DataConfig, train_texts: Texts, all_texts: Texts, say: Callable[[str], None]
    ) -> "SentencePieceTokenizer":
        limit, unigram = sample_characters(data.sentencepiece, data.vocab_size), data.sentencepiece == "unigram"
        how_long = f" (unigram: about 10 s per MB, for up to {limit / 1e6:.0f} MB)" if unigram else ""
        say(f"training a tokenizer of {data.vocab_size} pieces{how_long}")
        sample = spread_sample((c for text in train_texts() for c in CHUNK.findall(text)), limit)
        model = train_sentencepiece(sample, data.vocab_size, data.sentencepiece)
        tokenizer = cls(model, lossless=True, name="trained model")
        if tokenizer.vocab_size < data.vocab_size:
            say(f"data.vocab_size is {data.vocab_size}; this text gives only {tokenizer.vocab_size} pieces")
        return tokenizer


def _lines(text: str) -> list[str]:
    """Cuts a text into lines, which does not change its ids, and cuts lines longer than MAX_LINE, which may."""
    lines = LINE.findall(text)
    if max(map(len, lines), default=0) <= MAX_LINE:
        return lines
    cut: list[str] = []
    done = 0
    for i in [i for i, line in enumerate(lines) if len(line) > MAX_LINE]:
        cut += lines[done:i]
        cut += [lines[i][k : k + MAX_LINE] for k in range(0, len(lines[i]), MAX_LINE)]
        done = i + 1
    return cut + lines[done:]


def _has_any_as_bytes(text: str) -> bool:
    """Whether AS_BYTES matches in a text, ten times as fast."""
    if text.isascii():
        return False
    try:
        text.encode()
    except UnicodeEncodeError:  # a surrogate
        return True
    return "\u2581" in text


def _piece_bytes(sp: Any, i: int) -> bytes:
    if sp.is_control(i) or sp.is_unused(i):
        return b""
    if sp.is_unknown(i):
        return UNKNOWN
    piece = sp.id_to_piece(i)
    return bytes([int(piece[3:5], 16)]) if sp.is_byte(i) else to_bytes(piece.replace("\u2581", " "))
