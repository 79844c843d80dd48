"""Corpora that are token ids from the start: raw token files, and a synthetic stream."""

import hashlib
import itertools
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np

from jaxlm.config import Config, UserError, show
from jaxlm.data.corpus import Corpus, fingerprint
from jaxlm.data.progress import say_once
from jaxlm.data.sources.documents import BLOCK
from jaxlm.data.sources.files import HASH_LIMIT, named
from jaxlm.data.sources.nanogpt import read_meta
from jaxlm.data.sources.splits import find_files
from jaxlm.data.token_file import Shard, TokenFile
from jaxlm.data.tokenizers import Tokenizer, load_tokenizer
from jaxlm.data.tokens import Tokens

HEADER = 256  # int32 at the start of llm.c's .bin: a magic number, a version, the number of tokens, and zeros
MAGIC = {20240520: (1, np.dtype("<u2")), 20240801: (7, np.dtype("<u4"))}  # its version, and the dtype of tokens
LOOKED_AT = 100_000  # values at the start of a file without a header, to tell how wide they are
SYNTHETIC_TRAIN, SYNTHETIC_VAL = 1 << 20, 1 << 15  # tokens


def synthetic(config: Config) -> Corpus:
    """x[t+1] = (5 x[t] + 1 + noise) mod vocab_size with noise in {0, 1, 2, 3}: best possible loss ln 4 = 1.386 nats.

    Depends on `seed`, `data.vocab_size` and nothing else.
    """
    vocab_size = config.data.vocab_size
    train = [_chains(vocab_size, SYNTHETIC_TRAIN, seed=[config.seed % 2**64, 0])]
    val = [_chains(vocab_size, SYNTHETIC_VAL, seed=[config.seed % 2**64, 1])]
    return _corpus(config, vocab_size, train, val, None)


def _chains(vocab_size: int, num_tokens: int, seed: list[int], length: int = 4096) -> np.ndarray:
    """uint32 [num_tokens]: chains of `length`, computed side by side, one after the other."""
    rng = np.random.default_rng(seed)
    x = np.empty((length, num_tokens // length), np.uint32)
    x[0] = rng.integers(vocab_size, size=x.shape[1])
    noise = rng.integers(4, size=x.shape, dtype=np.uint32)
    for t in range(1, length):
        x[t] = (5 * x[t - 1].astype(np.uint64) + 1 + noise[t]) % vocab_size
    return np.ascontiguousarray(x.T).reshape(-1)


def raw_tokens(config: Config, progress: bool = False) -> Corpus:
    """Tokens of .bin (uint16, little-endian, as nanoGPT writes them, or with llm.c's header) or .npy (1-D integers)
    files, read when they are asked for; a folder's or a glob's one after the other.

    Without `data.val_path` the last `data.val_fraction` of the tokens are held out; in a folder of nanoGPT's, val.bin.
    `progress` shows on stderr which files are left out.

    Raises:
      UserError: a file is missing or of another kind, or holds an id that is not below `data.vocab_size`.
    """
    data, files = config.data, find_files(config.data)
    notes, tokenizer, vocab_size = [*files.notes], None, data.vocab_size
    if data.tokenizer_path:
        tokenizer = load_tokenizer(data.tokenizer_path)
        if tokenizer.vocab_size != vocab_size:
            raise UserError(f"data.vocab_size is {vocab_size}; allowed with the tokenizer {data.tokenizer_path}: "
                            f"{tokenizer.vocab_size} (model.vocab_multiple makes its tables larger)")  # fmt: skip
    elif meta := files.meta:
        tokenizer = read_meta(meta)
        vocab_size = tokenizer.vocab_size if tokenizer else vocab_size
        notes += [] if tokenizer else [f"{meta}: left alone, not a table of characters as nanoGPT writes it"]
    for note in notes if progress else ():
        say_once(note)
    opened = [[open_array(path, vocab_size) for path in part.values()] for part in (files.train, files.val)]
    for path, array in itertools.chain(*opened):
        _check_ids(array, path, vocab_size)
    train, val = ([array for _, array in part] for part in opened)
    if not files.val:
        whole = Tokens(train)
        cut = int(len(whole) * (1 - data.val_fraction))
        starts = _starts(train, tokenizer.bos_id) if tokenizer else np.empty(0)
        if len(starts) > 1:  # at the end of a document
            cut = int(next(iter(starts[starts >= cut]), len(whole)))
        train, val = whole.parts(0, cut), whole.parts(cut, len(whole))
    return _corpus(config, vocab_size, train, val, tokenizer)


def open_array(path: Path, vocab_size: int) -> tuple[Path, TokenFile]:
    """The ids (below `vocab_size`) of a .bin or .npy file. Raises UserError where it is none."""
    try:
        if path.suffix == ".npy":
            mapped = np.lib.format.open_memmap(path, mode="r")  # np.load would open archives and pickles too
            if mapped.ndim != 1 or mapped.dtype.kind not in "iu":
                raise UserError(f"{path}: {mapped.dtype} of shape {mapped.shape}; allowed: one dimension of integers")
            array = TokenFile(path, mapped.dtype, mapped.offset, len(mapped))
        elif path.stat().st_size % 2:
            raise UserError(f"{path}: {path.stat().st_size} bytes; allowed: a .bin of uint16 has an even number")
        else:
            array = _without_header(TokenFile(path, np.dtype("<u2"), 0, path.stat().st_size // 2), vocab_size)
    except UserError:
        raise
    except Exception as error:  # a .npy's header is a Python literal, and NumPy raises whatever Python's parser does
        raise UserError(f"{path}: unreadable ({show(str(error))})") from error
    return path, array


def _without_header(file: TokenFile, vocab_size: int) -> TokenFile:
    path, size = file.path, 4 * HEADER
    header = file.read(0, 2 * HEADER).view("<i4") if file.nbytes >= size else np.zeros(3, np.int32)
    if int(header[0]) not in MAGIC:
        _check_width(file, vocab_size)
        return file
    version, dtype = MAGIC[int(header[0])]
    tokens = TokenFile(path, dtype, size, (file.nbytes - size) // dtype.itemsize)
    if header[1] != version or header[2] != len(tokens):
        raise UserError(f"{path}: version {header[1]} with {len(tokens)} tokens; allowed with llm.c's header: version "
                        f"{version} ({dtype.name}), and the {header[2]} tokens that it says")  # fmt: skip
    return tokens


def _check_width(file: TokenFile, vocab_size: int) -> None:
    """Raises UserError where every second of the uint16s could be the upper half of an id."""
    path, head = file.path, file.read(0, LOOKED_AT)
    is_pairs = len(file) % 2 == 0 and len(head) >= 16 and head[1::2].max() <= (vocab_size - 1) >> 16
    if is_pairs and head[::2].max() > (vocab_size - 1) >> 16:
        raise UserError(f"{path}: looks like ids of 32 bits; allowed: .bin of uint16 without a header, of uint32 with "
                        "llm.c's, or .npy")  # fmt: skip


def _check_ids(file: TokenFile, name: Path, vocab_size: int) -> None:
    for start in range(0, len(file), BLOCK):
        block = file.read(start, start + BLOCK)
        bad = np.flatnonzero((block < 0) | (block >= vocab_size))
        if bad.size:
            raise UserError(f"{name}: id {block[bad[0]]} at position {start + bad[0]}; "
                            f"allowed: 0 to {vocab_size - 1}, the ids of the tokenizer or data.vocab_size")  # fmt: skip


def _corpus(
    config: Config, vocab_size: int, train: Sequence[Shard], val: Sequence[Shard], tokenizer: Tokenizer | None
) -> Corpus:
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
    return Tokens(arrays, starts=partial(_starts, arrays, tokenizer.bos_id), end=tokenizer.bos_id)


def _starts(arrays: Sequence[Shard], bos_id: int) -> np.ndarray:
    """Where documents start: at each bos, and at the first token."""
    offsets = np.cumsum([0, *map(len, arrays)])
    found = [
        np.flatnonzero(np.asarray(array[at : at + BLOCK]) == bos_id) + offset + at
        for array, offset in zip(arrays, offsets, strict=False)
        for at in range(0, len(array), BLOCK)
    ]
    return np.unique(np.concatenate([[0], *found]).astype(np.int64))


def array_hash(array: Shard) -> str:
    """sha256 of a 1-D array; of a sample of blocks where it is larger than HASH_LIMIT."""
    digest = hashlib.sha256(f"{array.dtype.str} {array.size}".encode())
    step = BLOCK // array.itemsize
    starts = range(0, array.size, step)
    stride = -(-array.nbytes // HASH_LIMIT)
    for start in starts[::stride] if stride > 1 else starts:
        digest.update(np.asarray(array[start : start + step]).tobytes())
    return digest.hexdigest()
