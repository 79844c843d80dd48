"""Opens a token store that store.py made: checks it against its manifest and returns its corpus."""

import contextlib
import hashlib
import itertools
import json
import resource
from pathlib import Path
from typing import Any, cast

import numpy as np

from jaxlm.config import UserError, show
from jaxlm.data.build import SPLITS, token_dtype
from jaxlm.data.corpus import Corpus, fingerprint
from jaxlm.data.token_file import Shard, TokenFile
from jaxlm.data.tokenizers import Tokenizer, load_tokenizer
from jaxlm.data.tokens import Tokens

FORMAT = 2  # version of the manifest
COUNTS = ("documents", "bytes", "tokens")  # of each split of a shard
CHECKED_BYTES = 1 << 28  # the hashes of stores up to this size are checked whenever they are opened


def open_store(folder: Path, verify: bool = False) -> Corpus:
    """Returns the corpus of a store. Tokens are read from the files only when they are needed.

    Args:
      verify: whether to check the hash of every file in a large store, too.

    Raises:
      UserError: a file is missing or does not match the manifest.
    """
    path = folder / "manifest.json"
    try:
        manifest = json.loads(path.read_text("utf-8"))
        found, vocab_size, dtype = manifest["format"], manifest["vocab_size"], manifest["dtype"]
        shards = manifest["shards"]
        if found == FORMAT:
            _check_shards(shards, manifest["masked"])
        totals = {s: {k: sum(shard[s][k] for shard in shards) for k in COUNTS} for s in SPLITS}
        facts = {"source": manifest["source"], "skipped": manifest["skipped"]} | totals
        names = ([shard[s]["sha256"] for shard in shards if shard[s]["tokens"]] for s in SPLITS)
        name = fingerprint(vocab_size, *names)
    except FileNotFoundError as error:
        raise UserError(f"{error.filename}: no such file; allowed: a complete token store (remove {folder})") from None
    except OSError as error:
        raise UserError(f"{path}: unreadable ({error.strerror})") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path}: not the manifest of a token store ({error!r}); remove {folder}") from error
    if found != FORMAT:
        raise UserError(f"{path}: format {found}; allowed: {FORMAT}")
    tokenizer = load_tokenizer(folder / "tokenizer")
    wanted = token_dtype(tokenizer.vocab_size)
    if (vocab_size, type(vocab_size), dtype) != (tokenizer.vocab_size, int, wanted.str):
        raise UserError(
            f"{path}: vocab_size {vocab_size} and dtype {dtype}; allowed with its tokenizer: "
            f"{tokenizer.vocab_size} and {wanted.str}; remove {folder}"
        )
    verify = verify or sum(totals[s]["tokens"] for s in SPLITS) * wanted.itemsize <= CHECKED_BYTES
    _allow_open_files()
    train, val = (_open_split(folder / s, [shard[s] for shard in shards], tokenizer, verify) for s in SPLITS)
    return Corpus(
        train=train,
        val=val,
        vocab_size=vocab_size,
        tokenizer=tokenizer,
        bytes_per_token=tokenizer.bytes_per_token(),
        fingerprint=name,
        folder=folder,
        facts=facts,
    )


def _check_shards(shards: Any, masked: bool) -> None:
    """Raises ValueError unless the shards look as `make_shards` returns them.

    For wrong types, raises whatever Python raises, such as TypeError.
    """
    suffixes = {"bin", "starts", "mask"} if masked else {"bin", "starts"}
    for shard in [shard[s] for shard in shards for s in SPLITS]:
        if any(type(shard[k]) is not int or shard[k] < 0 for k in COUNTS) or shard["sha256"].keys() != suffixes:
            raise ValueError(f"{show(shard)} is not a shard")


def _allow_open_files() -> None:
    """Raises this process's limit of open files, usually 1024, as far as allowed: each token file stays open."""
    most = 1 << 16
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = most if hard == resource.RLIM_INFINITY else min(most, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _open_split(folder: Path, shards: list[dict[str, Any]], tokenizer: Tokenizer, verify: bool) -> Tokens:
    """Opens the files of a split; checks their sizes and, with `verify`, their contents."""
    dtypes = {"bin": token_dtype(tokenizer.vocab_size), "starts": np.dtype("<u8"), "mask": np.dtype(bool)}
    found: dict[str, list[Shard]] = {"bin": [], "mask": []}
    for index, shard in enumerate(shards):
        for suffix, digest in shard["sha256"].items():
            path = folder / f"{index:05}.{suffix}"
            file = _open_file(path, dtypes[suffix], shard["documents" if suffix == "starts" else "tokens"])
            array = np.asarray(file) if verify else file
            if verify and hashlib.sha256(cast(Any, array)).hexdigest() != digest:
                raise UserError(f"{path}: content does not match its manifest; remove {folder.parent}")
            largest = np.max(array, initial=0) if verify and suffix == "bin" else 0
            if largest >= tokenizer.vocab_size:
                raise UserError(
                    f"{path}: id {largest}; allowed: 0 to {tokenizer.vocab_size - 1}; remove {folder.parent}"
                )
            if suffix in found:  # .starts files are opened again when they are needed
                found[suffix].append(file)
    offsets = [0, *itertools.accumulate(map(len, found["bin"]))]

    def starts() -> np.ndarray:
        parts = [np.fromfile(folder / f"{i:05}.starts", "<u8").astype(np.int64) for i in range(len(shards))]
        bounds = np.concatenate([[-1], *map(np.add, parts, offsets), [offsets[-1]]])
        if (bounds[1:] <= bounds[:-1]).any() or (offsets[-1] and bounds[1]):
            raise UserError(f"{folder}: its .starts files hold invalid document starts; remove {folder.parent}")
        return bounds[1:-1]

    return Tokens(found["bin"], found["mask"] or None, starts, tokenizer.bos_id)


def _open_file(path: Path, dtype: np.dtype, length: int) -> TokenFile:
    """Opens a file of `length` numbers; raises UserError if it is missing, unreadable or of another size."""
    try:
        found, wanted = path.stat().st_size, length * dtype.itemsize
        if found == wanted:
            return TokenFile(path, dtype, 0, length)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; allowed: a complete token store (remove {path.parents[1]})") from None
    except OSError as error:
        raise UserError(f"{path}: unreadable ({error.strerror})") from error
    raise UserError(f"{path}: {found} bytes; allowed: {wanted}, as its manifest says (remove {path.parents[1]})")
