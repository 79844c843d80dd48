"""What compressors that everyone has make of the held-out text, in bits per byte: a scale for the model's."""

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

MAX_TRAIN_BYTES = 64 << 20  # xz -9 looks no further back


def compression_baselines(corpus: Corpus) -> dict[str, float]:
    """{name: bits per byte of the validation text}; empty where there is no text, or too much of it.

    Takes about 10 s for 12 MB on two cores, once for each token store.
    """
    masked = corpus.val.masks is not None  # the model is judged on a part of the text
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
    """The documents that tokens [n] hold, one after the other, as UTF-8."""
    whole = np.asarray(tokens)
    ends = np.flatnonzero(whole == tokenizer.bos_id)
    return b"".join(to_bytes(tokenizer.decode(ids[1:])) for ids in np.split(whole, ends) if ids.size)


def _unigram_bytes(train: bytes, val: bytes) -> float:
    """Bytes needed for `val` with the byte frequencies of `train`, each counted once more."""
    seen, told = (np.bincount(np.frombuffer(data, np.uint8), minlength=256) for data in (train, val))
    return float(-(told * np.log2((seen + 1) / (seen + 1).sum())).sum() / 8)


def _write(temporary: Path, path: Path, text: str) -> None:
    """Whole or not at all; a store that cannot be written goes without."""
    try:
        temporary.write_text(text + "\n")
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
