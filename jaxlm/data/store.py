"""The token store: a corpus tokenized once, in a folder named after all that shaped it.

    <cache_dir>/<key>/    manifest.json, train.bin, val.bin, tokenizer/
    <cache_dir>/<key>.tmp/    one that is being made, renamed when whole
    <cache_dir>/<key>.lock    held while it is made

The .bin files are token ids, uint16 or uint32, little-endian; each document is bos and its tokens.
"""

import hashlib
import importlib.metadata
import json
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, get_args

import filelock
import numpy as np

from jaxlm.config import Config, DataConfig, UserError
from jaxlm.data.arrays import raw_tokens, synthetic
from jaxlm.data.corpus import Corpus, check_lengths, fingerprint
from jaxlm.data.files import content_hash
from jaxlm.data.progress import Progress, track
from jaxlm.data.sources import Document, Source, Split, open_source
from jaxlm.data.tokenizers import Tokenizer, load_tokenizer, make_tokenizer, to_bytes

FORMAT = 1
SPLITS: tuple[Split, ...] = get_args(Split)
BATCH_CHARACTERS = 1 << 22  # tokenized at a time


def prepare(config: Config, *, progress: bool = True) -> Corpus:
    """The corpus that `config.data` names: opened where a store of it exists, else made.

    Any number of processes may call this at once; one of them makes the store, the others wait. `progress` shows it
    on stderr.

    Raises:
      UserError: the data is missing, unreadable, too short or does not fit the configuration.
    """
    data = config.data
    if data.source == "synthetic":
        return synthetic(config)
    if data.source == "tokens":
        path = Path(data.path).expanduser()
        return _checked(open_store(path), config) if path.is_dir() else raw_tokens(config)
    source = open_source(data)
    key = hashlib.sha256(json.dumps(_key(data, source), sort_keys=True).encode()).hexdigest()[:16]
    cache = cache_folder(data)
    folder = cache / key
    if not (folder / "manifest.json").is_file():
        try:
            cache.mkdir(parents=True, exist_ok=True)
            with _locked(cache / f"{key}.lock", progress):
                if not (folder / "manifest.json").is_file():
                    _build(folder, source, config, progress)
        except OSError as error:
            raise UserError(f"data.cache_dir {cache}: cannot be written ({error.strerror or error})") from error
    return _checked(open_store(folder), config)


def cache_folder(data: DataConfig) -> Path:
    """Where token stores are kept."""
    if data.cache_dir:
        return Path(data.cache_dir).expanduser().absolute()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").absolute() / "jaxlm"


def _key(data: DataConfig, source: Source) -> dict[str, Any]:
    """All that shapes a store."""
    tokenizer: dict[str, Any] = {"kind": data.tokenizer}
    if data.tokenizer_path:
        path = Path(data.tokenizer_path).expanduser()
        if data.tokenizer == "hf" and path.is_dir():
            path /= "tokenizer.json"  # beside which may be the weights of a model
        files = sorted(path.iterdir()) if path.is_dir() else [path]
        tokenizer["files"] = [content_hash(file) for file in files if not file.is_dir()]
    elif data.tokenizer == "sentencepiece":
        tokenizer |= {"model": data.sentencepiece, "vocab_size": data.vocab_size}
    library = {"sentencepiece": "sentencepiece", "hf": "tokenizers"}.get(data.tokenizer)
    if library:
        tokenizer["version"] = importlib.metadata.version(library)
    return {"format": FORMAT, "source": source.key, "tokenizer": tokenizer}


@contextmanager
def _locked(path: Path, progress: bool) -> Iterator[None]:
    lock = filelock.FileLock(path)
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        if progress:
            print(f"waiting for the process that makes the token store {path.with_suffix('')}", file=sys.stderr)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _build(folder: Path, source: Source, config: Config, progress: bool) -> None:
    """Makes the store beside its final place and moves it there when it is whole."""
    temporary = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)  # of a process that died
    shutil.rmtree(folder, ignore_errors=True)  # without a manifest: no store
    temporary.mkdir()
    try:
        _fill(temporary, source, config, progress)
        os.rename(temporary, folder)
        _sync_folder(folder.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _fill(folder: Path, source: Source, config: Config, progress: bool) -> None:
    def texts(*splits: Split) -> Iterator[str]:
        return (document.text for split in splits for document in source.documents(split))

    if config.data.tokenizer == "sentencepiece" and not config.data.tokenizer_path and progress:
        print(f"training a tokenizer of {config.data.vocab_size} pieces", file=sys.stderr)
    tokenizer = make_tokenizer(config.data, lambda: texts("train"), lambda: texts(*SPLITS))
    dtype = np.dtype("<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4")
    with track("tokenizing", source.num_bytes, progress) as bar:
        facts = {s: _write_split(folder / f"{s}.bin", source.documents(s), tokenizer, dtype, bar) for s in SPLITS}
    skipped = sum(source.skipped.values())
    if skipped and progress:
        print(f"skipped {skipped} files or records that are no good", file=sys.stderr)
    where = f"data.source={config.data.source} {config.data.path or config.data.tfds_name}".rstrip()
    check_lengths(where, facts["train"]["tokens"], facts["val"]["tokens"], config.seq_len)
    (folder / "tokenizer").mkdir()
    tokenizer.save(folder / "tokenizer")
    manifest = {
        "format": FORMAT, "dtype": dtype.str, "vocab_size": tokenizer.vocab_size, "source": config.data.source,
        "skipped": skipped, **facts,
    }  # fmt: skip
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n", "utf-8")
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
    _sync_folder(folder / "tokenizer")
    _sync_folder(folder)


def _write_split(
    path: Path, documents: Iterator[Document], tokenizer: Tokenizer, dtype: np.dtype, bar: Progress
) -> dict[str, Any]:
    """Tokenizes documents into a file; gives their number, bytes and tokens, and the file's sha256."""
    facts = {"documents": 0, "bytes": 0, "tokens": 0}
    digest = hashlib.sha256()
    bos = np.array([tokenizer.bos_id], dtype).tobytes()
    with path.open("wb") as file:
        for batch in _batches(documents):
            for document, ids in zip(batch, tokenizer.encode([d.text for d in batch]), strict=True):
                data = (bos if document.first else b"") + ids.astype(dtype).tobytes()
                num_bytes = len(document.text) if document.text.isascii() else len(to_bytes(document.text))
                facts["documents"] += document.first
                facts["bytes"] += num_bytes
                facts["tokens"] += document.first + len(ids)
                digest.update(data)
                file.write(data)
                bar.advance(num_bytes)
    return facts | {"sha256": digest.hexdigest()}


def _batches(documents: Iterator[Document]) -> Iterator[list[Document]]:
    """Documents in lists of about BATCH_CHARACTERS."""
    batch, size = [], 0
    for document in documents:
        batch.append(document)
        size += len(document.text)
        if size >= BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def open_store(folder: Path) -> Corpus:
    """The corpus of a store, memory-mapped.

    Raises:
      UserError: a file is missing or is not as long as the manifest says.
    """
    path = folder / "manifest.json"
    try:
        manifest = json.loads(path.read_text("utf-8"))
        vocab_size, dtype = int(manifest["vocab_size"]), np.dtype(manifest["dtype"])
        facts = {k: manifest[k] for k in ("source", "skipped", *SPLITS)}
        name = fingerprint(vocab_size, *(facts[s]["sha256"] for s in SPLITS))
        tokens = {s: _map(folder / f"{s}.bin", dtype, int(facts[s]["tokens"])) for s in SPLITS}
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
        **tokens,
        vocab_size=vocab_size,
        tokenizer=tokenizer,
        bytes_per_token=tokenizer.bytes_per_token(),
        fingerprint=name,
        folder=folder,
        facts=facts,
    )


def _map(path: Path, dtype: np.dtype, num_tokens: int) -> np.ndarray:
    found, wanted = path.stat().st_size, num_tokens * dtype.itemsize
    if found != wanted:
        raise UserError(f"{path}: {found} bytes; allowed: {wanted}, as its manifest says (remove {path.parent})")
    return np.memmap(path, dtype, mode="r") if wanted else np.empty(0, dtype)


def _checked(corpus: Corpus, config: Config) -> Corpus:
    check_lengths(str(corpus.folder), len(corpus.train), len(corpus.val), config.seq_len)
    return corpus


def _sync_folder(folder: Path) -> None:
    """Makes the names in a folder durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
