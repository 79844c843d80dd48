"""sentencepiece tokenizers: lossless models trained on the corpus, and models made elsewhere."""

import importlib.metadata
import io
import itertools
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np

from jaxlm.config import DataConfig, UserError
from jaxlm.data.tokenizers.base import UNKNOWN, Texts, Tokenizer, code_points, to_bytes, write_spec
from jaxlm.data.tokenizers.hf import ENDS
from jaxlm.data.tokenizers.shipped import write_beside

SAMPLE_CHARACTERS = 20_000_000  # of the training text, on which sentencepiece is trained, at most
# Training a unigram model takes 17 s of one core per million characters, and larger vocabularies need more characters.
# On Python source, 2 and 4 million characters give 2.203 and 2.206 bytes per token with 1024 pieces, and 3.65 and 3.81
# with 8192 pieces.
UNIGRAM_CHARACTERS, UNIGRAM_CHARACTERS_PER_PIECE = 2_000_000, 1000

# A sentence is a line with the newlines before it, so "\n        return" may become one piece, and no piece has a
# newline after any other character. Text can therefore be cut before newlines without changing its ids.
SENTENCE = re.compile(r"\n*[^\n]{1,1000}|\n+")
CHUNK = re.compile(r"[\s\S]{0,999}[^\n](?=\n|\Z)|[\s\S]{1,1000}")
LINE = re.compile(r"\n*[^\n]+|\n+")
MAX_LINE = 1000  # characters; longer lines are cut, because encoding time grows faster than the length
# sentencepiece writes a space as U+2581 and accepts no surrogates, so these characters are encoded as bytes.
AS_BYTES = re.compile("([\u2581\ud800-\udfff]+)")
SPACES_AS_BYTES = re.compile("([ \u2581\ud800-\udfff]+)")  # for a model without a piece for spaces

TURNS = ("<start_of_turn>",)  # symbols that open messages


def _library() -> Any:
    """The module sentencepiece, as Any, because type checkers do not see the functions that it makes at run time."""
    import sentencepiece

    return sentencepiece


class SentencePieceTokenizer(Tokenizer):
    """A sentencepiece model; lossless if `train_sentencepiece` made it."""

    library = "sentencepiece"

    def __init__(self, model: bytes, lossless: bool, name: str):
        """Loads the bytes of a `model`; errors call it `name`.

        Raises:
          UserError: the bytes are not a sentencepiece model, or it has no bos.
        """
        try:
            sp = self._processor = _library().SentencePieceProcessor(model_proto=model)
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
        sp = self._processor
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
            encoded = self._processor.encode(texts, num_threads=self.num_threads)
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
            ids |= zip(new, self._processor.encode(new, num_threads=self.num_threads), strict=True)
            encoded = list(map(ids.__getitem__, lines))
        else:  # few repeated lines, as in prose: a lookup per line would cost more than it saves
            encoded = self._processor.encode(lines, num_threads=self.num_threads)
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
            key["sample"] = sample_characters(data.sentencepiece, data.vocab_size)
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


def sample_characters(kind: Literal["bpe", "unigram"], vocab_size: int) -> int:
    """The most characters of the training text that a model is trained on."""
    if kind == "bpe":
        return SAMPLE_CHARACTERS
    return min(max(UNIGRAM_CHARACTERS, UNIGRAM_CHARACTERS_PER_PIECE * vocab_size), SAMPLE_CHARACTERS)


def spread_sample(chunks: Iterable[str], limit: int) -> list[str]:
    """Every k-th chunk, where k is the smallest power of two that keeps at most `limit` characters."""
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


def train_sentencepiece(texts: list[str], vocab_size: int, kind: Literal["bpe", "unigram"] = "bpe") -> bytes:
    """Trains a lossless model with at most `vocab_size` pieces and returns its bytes, the same on every machine.

    Pieces may hold several words ("self." or "\\n        return"). On Python source with 2048 pieces, BPE then gives
    3.23 bytes per token; splitting at spaces gives 2.90.

    Raises:
      UserError: no model of that size can be trained on the text.
    """
    sentencepiece = _library()
    # The number of threads changes the pieces of unigram, so it is fixed. By default, unigram starts from a million
    # pieces; with 25 per piece of the vocabulary, training on 2 MB of code takes 12 s instead of 21 s.
    pinned = {"num_threads": 1}
    if kind == "unigram":
        pinned = {"num_threads": 16, "seed_sentencepiece_size": min(25 * vocab_size, 1_000_000)}

    def train(texts: Iterable[str], coverage: float) -> bytes:
        model = io.BytesIO()
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=(s for text in texts for s in SENTENCE.findall(AS_BYTES.sub("\n", text))),
            model_writer=model,
            model_type=kind,
            vocab_size=vocab_size,
            hard_vocab_limit=False,
            character_coverage=coverage,
            byte_fallback=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            split_by_whitespace=False,
            split_by_unicode_script=False,
            allow_whitespace_only_pieces=True,
            max_sentencepiece_length=32,
            bos_id=0,
            unk_id=1,
            eos_id=-1,
            pad_id=-1,
            minloglevel=2,
            **pinned,
        )
        return model.getvalue()

    try:
        try:
            return train(texts, coverage=0.9995)  # the rarest characters are encoded as bytes
        except RuntimeError as error:
            if "required_chars" not in str(error):
                raise
            return train(_without_rare_characters(texts, (vocab_size - 258) // 2), coverage=1.0)
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"data.vocab_size is {vocab_size}: cannot train a sentencepiece model on this text ({reason})"
        ) from error


def _without_rare_characters(texts: list[str], keep: int) -> Iterator[str]:
    """The texts with all but the `keep` most frequent characters replaced by newlines."""
    counts = np.zeros(0x110000, np.int64)
    for text in texts:
        np.add.at(counts, code_points(text), 1)
    rare = set(np.flatnonzero(counts)) - set(np.argsort(-counts, kind="stable")[: max(keep, 0)])
    table = dict.fromkeys(map(int, rare), "\n")
    return (text.translate(table) for text in texts)
