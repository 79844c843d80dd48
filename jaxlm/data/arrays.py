"""Corpora that are token ids from the start: raw token files, and a synthetic stream."""

from pathlib import Path

import numpy as np

from jaxlm.config import Config, UserError
from jaxlm.data.corpus import Corpus, check_lengths, fingerprint
from jaxlm.data.sources import BLOCK, array_hash
from jaxlm.data.tokenizers import load_tokenizer

SYNTHETIC_TRAIN, SYNTHETIC_VAL = 1 << 20, 1 << 15  # tokens


def synthetic(config: Config) -> Corpus:
    """x[t+1] = (5 x[t] + 1 + noise) mod vocab_size with noise in {0, 1, 2, 3}: best possible loss ln 4 = 1.386 nats.

    Depends on `seed`, `data.vocab_size` and nothing else.
    """
    vocab_size = config.data.vocab_size
    train = _chains(vocab_size, SYNTHETIC_TRAIN, seed=[config.seed % 2**64, 0])
    val = _chains(vocab_size, SYNTHETIC_VAL, seed=[config.seed % 2**64, 1])
    return _corpus(config, "data.source=synthetic", train, val, vocab_size)


def _chains(vocab_size: int, num_tokens: int, seed: list[int], length: int = 4096) -> np.ndarray:
    """uint32 [num_tokens]: chains of `length`, computed side by side, one after the other."""
    rng = np.random.default_rng(seed)
    x = np.empty((length, num_tokens // length), np.uint32)
    x[0] = rng.integers(vocab_size, size=x.shape[1])
    noise = rng.integers(4, size=x.shape, dtype=np.uint32)
    for t in range(1, length):
        x[t] = (5 * x[t - 1].astype(np.uint64) + 1 + noise[t]) % vocab_size
    return np.ascontiguousarray(x.T).reshape(-1)


def raw_tokens(config: Config) -> Corpus:
    """Tokens of .bin (uint16, little-endian, as nanoGPT writes them) or .npy (1-D integers) files, memory-mapped.

    Without `data.val_path` the last `data.val_fraction` of the tokens are held out.

    Raises:
      UserError: a file is missing or of another kind, or holds an id that is not below `data.vocab_size`.
    """
    data = config.data
    train = _open_array("data.path", data.path)
    if data.val_path:
        val = _open_array("data.val_path", data.val_path)
        _check_ids(val, data.val_path, data.vocab_size)
    _check_ids(train, data.path, data.vocab_size)
    if not data.val_path:
        cut = int(len(train) * (1 - data.val_fraction))
        train, val = train[:cut], train[cut:]
    return _corpus(config, f"data.path {data.path}", train, val, data.vocab_size)


def _open_array(key: str, name: str) -> np.ndarray:
    path = Path(name).expanduser()
    if not path.is_file() or path.suffix not in (".bin", ".npy"):
        found = f"a {path.suffix or 'plain'} file" if path.is_file() else "no such file"
        raise UserError(f"{key} is '{name}': {found}; allowed with data.source=tokens: a token store, .bin or .npy")
    try:
        if path.suffix == ".npy":
            array = np.load(path, mmap_mode="r")
        elif path.stat().st_size % 2:
            raise UserError(f"{key} {path}: {path.stat().st_size} bytes; allowed: a .bin of uint16 has an even number")
        else:
            array = np.memmap(path, "<u2", mode="r") if path.stat().st_size else np.empty(0, "<u2")
    except UserError:
        raise
    except (OSError, ValueError) as error:
        raise UserError(f"{key} {path}: unreadable ({error})") from error
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise UserError(f"{key} {path}: {array.dtype} of shape {array.shape}; allowed: one dimension of integers")
    return array


def _check_ids(array: np.ndarray, name: str, vocab_size: int) -> None:
    for start in range(0, len(array), BLOCK):
        block = array[start : start + BLOCK]
        bad = np.flatnonzero((block < 0) | (block >= vocab_size))
        if bad.size:
            raise UserError(f"{name}: id {block[bad[0]]} at position {start + bad[0]}; "
                            f"allowed: 0 to data.vocab_size - 1 = {vocab_size - 1}")  # fmt: skip


def _corpus(config: Config, where: str, train: np.ndarray, val: np.ndarray, vocab_size: int) -> Corpus:
    check_lengths(where, len(train), len(val), config.seq_len)
    path = config.data.tokenizer_path if config.data.source == "tokens" else ""
    tokenizer = load_tokenizer(path) if path else None
    if tokenizer and tokenizer.vocab_size != vocab_size:
        raise UserError(f"data.vocab_size is {vocab_size}; allowed with the tokenizer {path}: {tokenizer.vocab_size}")
    return Corpus(
        train=train,
        val=val,
        vocab_size=vocab_size,
        tokenizer=tokenizer,
        bytes_per_token=tokenizer.bytes_per_token() if tokenizer else None,
        fingerprint=fingerprint(vocab_size, array_hash(train), array_hash(val)),
        folder=None,
        facts={"source": config.data.source, "train": {"tokens": len(train)}, "val": {"tokens": len(val)}},
    )
