"""The token store: a corpus tokenized once, in a folder named after all that shaped it.

    <cache_dir>/<key>/              manifest.json, train/00000.bin and .starts (.mask), ..., val/, tokenizer/
    <cache_dir>/<key>.building/     one that is being made, renamed when whole; goes on where it was stopped
    <cache_dir>/tokenizer-<key>/    one that was made of a corpus

The .bin files are token ids, uint16 or uint32, little-endian; each document is bos and its tokens, and .starts says at
which tokens of its shard documents start. The manifest has counts and the sha256 of every file.
"""

import hashlib
import importlib.metadata
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any, cast

import filelock
import numpy as np

from jaxlm.config import DataConfig, UserError
from jaxlm.data.build import SPLITS, make_shards, token_dtype
from jaxlm.data.corpus import Corpus, check_lengths, fingerprint
from jaxlm.data.files import MAX_UNITS, UNIT_BYTES, content_hash
from jaxlm.data.progress import track
from jaxlm.data.sources import Document, Source, Split, Unit
from jaxlm.data.tokenizers import Tokenizer, load_tokenizer, make_tokenizer
from jaxlm.data.tokens import Tokens

FORMAT = 2
CHECKED_BYTES = 1 << 28  # of a store whose files are compared with their hashes whenever it is opened
SAMPLE_BYTES = 1 << 29  # of a corpus that are read to train a tokenizer on


def cache_folder(data: DataConfig) -> Path:
    """Where token stores are kept."""
    if data.cache_dir:
        return Path(data.cache_dir).expanduser().absolute()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").absolute() / "jaxlm"


def stored_tokenizer(data: DataConfig, sources: list[Source], progress: bool) -> tuple[Tokenizer, str]:
    """The tokenizer of a configuration, made where there is none yet, and what names it among others.

    Raises:
      UserError: it cannot be loaded, or the corpus is no good to train one.
    """
    key = _tokenizer_key(data, sources)
    name = _short(key)
    if "sources" not in key:
        return make_tokenizer(data, _no_texts, _no_texts), name
    folder = cache_folder(data) / f"tokenizer-{name}"

    def make(temporary: Path) -> None:
        if data.tokenizer == "sentencepiece" and progress:
            print(f"training a tokenizer of {data.vocab_size} pieces", file=sys.stderr)
        sample = [unit for source in sources for unit in source.units()]
        tokenizer = make_tokenizer(
            data, lambda: _texts(sample, ("train",), SAMPLE_BYTES), lambda: _texts(sample, SPLITS)
        )
        tokenizer.save(temporary)

    _made_once(folder, make, lambda folder: folder.is_dir(), progress)
    return load_tokenizer(folder), name


def stored(data: DataConfig, source: Source, tokenizer: Tokenizer, name: str, seq_len: int, progress: bool) -> Corpus:
    """The corpus of a source: opened where a store of it exists, else made.

    Any number of processes may call this at once; one of them makes the store, the others wait.

    Raises:
      UserError: the data is unreadable or too short, or the store cannot be written.
    """
    shape = [FORMAT, UNIT_BYTES, MAX_UNITS]
    folder = cache_folder(data) / _short({"format": shape, "source": source.key, "tokenizer": name})

    def make(temporary: Path) -> None:
        _fill(temporary, source, tokenizer, seq_len, progress)

    _made_once(folder, make, lambda folder: (folder / "manifest.json").is_file(), progress)
    return open_store(folder)


def _short(key: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]


def _tokenizer_key(data: DataConfig, sources: list[Source]) -> dict[str, Any]:
    """All that shapes a tokenizer; with `sources` where it is made of them."""
    key: dict[str, Any] = {"kind": data.tokenizer}
    library = {"sentencepiece": "sentencepiece", "hf": "tokenizers"}.get(data.tokenizer)
    if library:
        key["version"] = importlib.metadata.version(library)
    if data.tokenizer_path:
        path = Path(data.tokenizer_path).expanduser()
        if data.tokenizer == "hf" and path.is_dir():
            path /= "tokenizer.json"  # beside which may be the weights of a model
        files = sorted(path.iterdir()) if path.is_dir() else [path]
        return key | {"files": [content_hash(file) for file in files if not file.is_dir()]}
    if data.tokenizer == "sentencepiece":
        key |= {"model": data.sentencepiece, "vocab_size": data.vocab_size}
    return key if data.tokenizer == "bytes" else key | {"sources": [source.key for source in sources]}


def _no_texts() -> Iterator[str]:
    return iter(())


def _texts(units: list[Unit], splits: tuple[Split, ...], limit: int | None = None) -> Iterator[str]:
    """The texts of all units; the first of each where all together have more than `limit` characters."""
    for unit in units:
        left = None if limit is None else max(limit // len(units), 1 << 20)
        for item in unit.read():
            if isinstance(item, Document) and item.split in splits:
                yield item.text
                if left is not None and (left := left - len(item.text)) <= 0:
                    break


def _made_once(folder: Path, make: Callable[[Path], None], whole: Callable[[Path], bool], progress: bool) -> None:
    """Has `make` fill a folder beside its final place and moves it there, unless it is there."""
    if whole(folder):
        return
    cache, temporary = folder.parent, folder.with_name(f"{folder.name}.building")
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with _locked(cache / f"{folder.name}.lock", progress):
            if whole(folder):
                return
            shutil.rmtree(folder, ignore_errors=True)
            temporary.mkdir(exist_ok=True)
            try:
                make(temporary)
                _sync(temporary)
                os.rename(temporary, folder)
                _sync_folder(cache)
            except UserError:  # the data is no good: another run would not get further
                shutil.rmtree(temporary, ignore_errors=True)
                raise
    except OSError as error:
        kept = f"; what is done is kept in {temporary}" if any(temporary.glob("*.json")) else ""
        if not kept:
            shutil.rmtree(temporary, ignore_errors=True)
        raise UserError(f"data.cache_dir {cache}: cannot be written ({error.strerror or error}){kept}") from error


@contextmanager
def _locked(path: Path, progress: bool) -> Iterator[None]:
    lock = filelock.FileLock(path)
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        if progress:
            print(f"waiting for the process that makes {path.with_suffix('')}", file=sys.stderr)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _fill(folder: Path, source: Source, tokenizer: Tokenizer, seq_len: int, progress: bool) -> None:
    (folder / "tokenizer").mkdir(exist_ok=True)
    tokenizer.save(folder / "tokenizer")
    with track("tokenizing", source.num_bytes, progress) as bar:
        shards = make_shards(folder, source.units(), tokenizer, source.masked, bar)
    totals = {s: {k: sum(shard[s][k] for shard in shards) for k in ("documents", "bytes", "tokens")} for s in SPLITS}
    skipped = source.skipped + sum(shard["skipped"] for shard in shards)
    if skipped and progress:
        reasons = [reason for shard in shards for reason in shard["reasons"]]
        print(f"skipped {skipped} files or records that are no good", file=sys.stderr)
        print(*(f"  {reason}" for reason in islice(reasons, 5)), sep="\n", end="\n" * bool(reasons), file=sys.stderr)
    check_lengths(f"data.source={source.name}", totals["train"]["tokens"], totals["val"]["tokens"], seq_len)
    manifest = {
        "format": FORMAT, "dtype": token_dtype(tokenizer.vocab_size).str, "vocab_size": tokenizer.vocab_size,
        "source": source.name, "masked": source.masked, "skipped": skipped, **totals, "shards": shards,
    }  # fmt: skip
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n", "utf-8")
    for file in folder.glob("?????.json"):
        file.unlink()


def open_store(folder: Path, verify: bool = False) -> Corpus:
    """The corpus of a store, memory-mapped.

    Args:
      verify: compare every file with its hash, of large stores too.

    Raises:
      UserError: a file is missing or is not what the manifest says.
    """
    path = folder / "manifest.json"
    try:
        manifest = json.loads(path.read_text("utf-8"))
        vocab_size, dtype, shards = int(manifest["vocab_size"]), np.dtype(manifest["dtype"]), manifest["shards"]
        facts = {k: manifest[k] for k in ("source", "skipped", *SPLITS)}
        verify = verify or sum(facts[s]["tokens"] for s in SPLITS) * dtype.itemsize <= CHECKED_BYTES
        tokens = {s: _open_split(folder, s, dtype, [shard[s] for shard in shards], verify) for s in SPLITS}
        name = fingerprint(
            vocab_size, *([shard[s]["sha256"] for shard in shards if shard[s]["tokens"]] for s in SPLITS)
        )
    except FileNotFoundError as error:
        raise UserError(f"{error.filename}: no such file; allowed: a whole token store (remove {folder})") from None
    except UserError:
        raise
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: not the manifest of a token store ({error!r}); remove {folder}") from error
    if manifest["format"] != FORMAT:
        raise UserError(f"{path}: format {manifest['format']}; allowed: {FORMAT}")
    tokenizer = load_tokenizer(folder / "tokenizer")
    return Corpus(
        train=tokens["train"], val=tokens["val"], vocab_size=vocab_size, tokenizer=tokenizer,
        bytes_per_token=tokenizer.bytes_per_token(),
        fingerprint=name, folder=folder, facts=facts,
    )  # fmt: skip


def _open_split(folder: Path, split: Split, dtype: np.dtype, shards: list[dict[str, Any]], verify: bool) -> Tokens:
    dtypes = {"bin": dtype, "starts": np.dtype("<u8"), "mask": np.dtype(bool)}
    found: dict[str, list[np.ndarray]] = {}
    for index, shard in enumerate(shards):
        for suffix, digest in shard["sha256"].items():
            path = folder / split / f"{index:05}.{suffix}"
            array = _map(path, dtypes[suffix], shard["documents" if suffix == "starts" else "tokens"])
            if verify and hashlib.sha256(cast(Any, array)).hexdigest() != digest:
                raise UserError(f"{path}: not the content that its manifest says; remove {folder}")
            found.setdefault(suffix, []).append(array)
    offsets = np.cumsum([0, *map(len, found["bin"])])

    def starts() -> np.ndarray:
        return np.concatenate([part.astype(np.int64) + o for part, o in zip(found["starts"], offsets, strict=False)])

    return Tokens(found["bin"], found.get("mask"), starts)


def _map(path: Path, dtype: np.dtype, length: int) -> np.ndarray:
    found, wanted = path.stat().st_size, length * dtype.itemsize
    if found != wanted:
        raise UserError(f"{path}: {found} bytes; allowed: {wanted}, as its manifest says (remove {path.parents[1]})")
    return np.memmap(path, dtype, mode="r") if wanted else np.empty(0, dtype)


def _sync(folder: Path) -> None:
    """Makes the files of a folder durable; those of shards are already."""
    for path in (p for p in folder.rglob("*") if p.is_file() and p.suffix not in (".bin", ".starts", ".mask")):
        with path.open("rb") as file:
            os.fsync(file.fileno())
    for path in (*(p for p in folder.rglob("*") if p.is_dir()), folder):
        _sync_folder(path)


def _sync_folder(folder: Path) -> None:
    """Makes the names in a folder durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
