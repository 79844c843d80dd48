"""Trains sentencepiece models that are lossless: on a sample of the corpus, the same on every machine."""

import importlib
import io
import re
from collections.abc import Iterable, Iterator
from typing import Any, Literal

import numpy as np

from jaxlm.config import UserError
from jaxlm.data.tokenizers.base import code_points

SAMPLE_CHARACTERS = 20_000_000  # of the training text, on which sentencepiece is trained, at most
# Training a unigram model takes 17 s of one core per million characters, and larger vocabularies need more characters.
# On Python source, 2 and 4 million characters give 2.203 and 2.206 bytes per token with 1024 pieces, and 3.65 and 3.81
# with 8192 pieces.
UNIGRAM_CHARACTERS, UNIGRAM_CHARACTERS_PER_PIECE = 2_000_000, 1000
# Unigram's scores are rounded to multiples of 1/512. Sums over a line are then exact in float32, so that every program
# breaks ties between equally good ways to write a run of spaces as sentencepiece does.
SCORES_PER_NAT = 512

# A sentence is a line with the newlines before it, so "\n        return" may become one piece, and no piece has a
# newline after any other character. Text can therefore be cut before newlines without changing its ids.
SENTENCE = re.compile(r"\n*[^\n]{1,1000}|\n+")
CHUNK = re.compile(r"[\s\S]{0,999}[^\n](?=\n|\Z)|[\s\S]{1,1000}")
# sentencepiece writes a space as U+2581 and accepts no surrogates, so these characters are encoded as bytes.
AS_BYTES = re.compile("([\u2581\ud800-\udfff]+)")


def sentencepiece_library() -> Any:
    """The module sentencepiece, as Any, because type checkers do not see the functions that it makes at run time."""
    import sentencepiece

    return sentencepiece


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
    sentencepiece = sentencepiece_library()
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
        return model.getvalue() if kind == "bpe" else _with_rounded_scores(model.getvalue())

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


def _with_rounded_scores(model: bytes) -> bytes:
    messages: Any = importlib.import_module("sentencepiece.sentencepiece_model_pb2")  # generated at run time
    content = messages.ModelProto.FromString(model)
    for piece in content.pieces:
        piece.score = round(piece.score * SCORES_PER_NAT) / SCORES_PER_NAT
    return content.SerializeToString(deterministic=True)


def _without_rare_characters(texts: list[str], keep: int) -> Iterator[str]:
    """The texts with all but the `keep` most frequent characters replaced by newlines."""
    counts = np.zeros(0x110000, np.int64)
    for text in texts:
        np.add.at(counts, code_points(text), 1)
    rare = set(np.flatnonzero(counts)) - set(np.argsort(-counts, kind="stable")[: max(keep, 0)])
    table = dict.fromkeys(map(int, rare), "\n")
    return (text.translate(table) for text in texts)
