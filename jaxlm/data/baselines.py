"""Bits per byte of common compressors on the validation text: a scale for the bits per byte of the model."""

import gzip
import json
import lzma
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from jaxlm.data.corpus import Corpus
from jaxlm.data.tokenizers import Tokenizer, to_bytes
from jaxlm.data.tokens import Tokens

MAX_TRAIN_BYTES = 64 << 20  # the window of xz -9: it finds no matches further back


def compression_baselines(corpus: Corpus) -> dict[str, float]:
    """Returns {name: bits per byte of the validation text}; empty if there is no text or too much of it.

    Takes about 10 s for 12 MB on two cores, once for each token store, which caches the result. Empty too for
    fine-tuning records, where the model is scored on a part of the text only.
    """
    masked = corpus.val.masks is not None
    if corpus.tokenizer is None or masked or len(corpus.train) > MAX_TRAIN_BYTES:
        return {}
    if corpus.facts["train"].get("bytes", 0) > MAX_TRAIN_BYTES:
        return {}
    cache = corpus.folder / "baselines.json" if corpus.folder else None
    if cache and cache.is_file():
        return json.loads(cache.read_text())
    train, val = (text_of(tokens, corpus.tokenizer) for tokens in (corpus.train, corpus.val))
    if not val:
        return {}

    def xz(data: bytes) -> int:
        return len(lzma.compress(data, preset=9 | lzma.PRESET_EXTREME))

    with ThreadPoolExecutor(2) as pool:
        train_val, only_train, only_val = (pool.submit(xz, data) for data in (train + val, train, val))
        sizes = {
            "unigram of bytes": _unigram_bytes(train, val),
            "gzip -9": len(gzip.compress(val, 9)),
            "xz -9e": only_val.result(),
            "xz -9e after the training text": train_val.result() - only_train.result(),
        }
    baselines = {name: 8 * size / len(val) for name, size in sizes.items()}
    if cache:
        _write(cache.with_name(f"{cache.name}.{os.getpid()}"), cache, json.dumps(baselines))
    return baselines


def text_of(tokens: Tokens, tokenizer: Tokenizer) -> bytes:
    """Returns the text of the documents in tokens [n], concatenated, as UTF-8."""
    whole = np.asarray(tokens)
    ends = np.flatnonzero(whole == tokenizer.bos_id)
    return b"".join(to_bytes(tokenizer.decode(ids[1:])) for ids in np.split(whole, ends) if ids.size)


def _unigram_bytes(train: bytes, val: bytes) -> float:
    """Returns the bytes needed to encode `val` with the byte frequencies of `train`, with add-one smoothing."""
    train_counts, val_counts = (np.bincount(np.frombuffer(data, np.uint8), minlength=256) for data in (train, val))
    return float(-(val_counts * np.log2((train_counts + 1) / (train_counts + 1).sum())).sum() / 8)


def _write(temporary: Path, path: Path, text: str) -> None:
    """Writes a file atomically. Does nothing if the folder cannot be written: the cache is optional."""
    try:
        temporary.write_text(text + "\n")
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
