"""Makes a corpus from arrays of token ids."""

import hashlib
from collections.abc import Sequence
from functools import partial

import numpy as np

from jaxlm.config import Config
from jaxlm.data.corpus import Corpus, fingerprint
from jaxlm.data.sources.documents import BLOCK
from jaxlm.data.sources.files import HASH_LIMIT, named
from jaxlm.data.token_file import Shard
from jaxlm.data.tokenizers import Tokenizer
from jaxlm.data.tokens import Tokens


def corpus_of(
    config: Config, vocab_size: int, train: Sequence[Shard], val: Sequence[Shard], tokenizer: Tokenizer | None
) -> Corpus:
    """The corpus of two lists of arrays of ids. Without a tokenizer, the ids have no text."""
    splits = [_tokens(part, tokenizer) for part in (train, val)]
    return Corpus(
        train=splits[0],
        val=splits[1],
        vocab_size=vocab_size,
        tokenizer=tokenizer,
        bytes_per_token=tokenizer.bytes_per_token() if tokenizer else None,
        fingerprint=fingerprint(vocab_size, *(list(map(array_hash, part)) for part in (train, val))),
        folder=None,
        facts={"source": named(config.data)}
        | {name: {"tokens": len(s)} for name, s in zip(("train", "val"), splits, strict=True)},
    )


def _tokens(arrays: Sequence[Shard], tokenizer: Tokenizer | None) -> Tokens:
    if tokenizer is None:
        return Tokens(arrays)
    return Tokens(arrays, starts=partial(starts_of, arrays, tokenizer.bos_id), end=tokenizer.bos_id)


def starts_of(arrays: Sequence[Shard], bos_id: int) -> np.ndarray:
    """int64 [documents]: where documents start, which is at each bos and at the first token."""
    offsets = np.cumsum([0, *map(len, arrays)])
    found = [
        np.flatnonzero(np.asarray(array[at : at + BLOCK]) == bos_id) + offset + at
        for array, offset in zip(arrays, offsets, strict=False)
        for at in range(0, len(array), BLOCK)
    ]
    return np.unique(np.concatenate([[0], *found]).astype(np.int64))


def array_hash(array: Shard) -> str:
    """The sha256 of a 1-D array's dtype, size and content; of an array above HASH_LIMIT bytes, a sample of blocks."""
    digest = hashlib.sha256(f"{array.dtype.str} {array.size}".encode())
    step = BLOCK // array.itemsize
    starts = range(0, array.size, step)
    stride = -(-array.nbytes // HASH_LIMIT)
    for start in starts[::stride] if stride > 1 else starts:
        digest.update(np.asarray(array[start : start + step]).tobytes())
    return digest.hexdigest()
