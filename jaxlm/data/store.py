"""Makes the token store: a corpus, tokenized once, in a folder whose name is a hash of everything that shaped it.

    <cache_dir>/<key>/              manifest.json, train/00000.bin and .starts (.mask), ..., val/, tokenizer/
    <cache_dir>/<key>.building/     a store in progress; renamed when complete, resumed if it was interrupted
    <cache_dir>/tokenizer-<key>/    a tokenizer made from a corpus

The .bin files hold token ids, uint16 or uint32, little-endian; each document is bos and its tokens. The .starts files
hold the index, within the shard, of each document's first token. The manifest holds the counts of every shard and the
sha256 of every shard file.
"""

import functools
import hashlib
import importlib.metadata
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import filelock

from jaxlm.config import DataConfig, UserError
from jaxlm.config.paths import user_path
from jaxlm.data.build import SPLITS, Unfinished, make_shards, token_dtype
from jaxlm.data.corpus import Corpus, check_lengths
from jaxlm.data.progress import track
from jaxlm.data.sources.documents import BLOCK, Document, Source, Split, Unit
from jaxlm.data.sources.files import LINE_BYTES, MAX_UNITS, UNIT_BYTES, named
from jaxlm.data.sources.opening import open_source
from jaxlm.data.store_reader import COUNTS, FORMAT, open_store
from jaxlm.data.tokenizers import Tokenizer, load_tokenizer, make_tokenizer
from jaxlm.data.tokenizers.loading import TOKENIZERS
from jaxlm.data.tokenizers.sentencepiece_training import SAMPLE_CHARACTERS
from jaxlm.host import signals
from jaxlm.host.temporary import temporary_folder

MARKUP = 1  # version of how special tokens of a chat template are encoded
LOCK_LIMIT = 12 * 3600  # seconds to wait for the process that makes a store
SHOWN_REASONS = 5  # how many reasons for skipping are printed
SAMPLE_BYTES = 1 << 29  # about how many characters of a corpus are read to train a tokenizer on
# Together with the source and the tokenizer, these decide which tokens are in which shard and which text a tokenizer is
# trained on.
SHAPE = [FORMAT, UNIT_BYTES, MAX_UNITS, LINE_BYTES, BLOCK, SAMPLE_BYTES, SAMPLE_CHARACTERS]


def cache_folder(data: DataConfig) -> Path:
    """Returns the folder of all token stores."""
    if data.cache_dir:
        return user_path("data.cache_dir", data.cache_dir).absolute()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").absolute() / "jaxlm"


def stored_tokenizer(data: DataConfig, sources: list[Source], progress: bool) -> tuple[Tokenizer, str]:
    """Returns the tokenizer of a configuration, made first if it does not exist yet, and a hash that identifies it.

    Raises:
      UserError: the tokenizer cannot be loaded, or cannot be trained on this corpus.
    """
    if data.tokenizer_path or TOKENIZERS[data.tokenizer].corpus_key(data) is None:
        tokenizer = make_tokenizer(data, _no_texts, _no_texts)
        return tokenizer, _saved_hash(tokenizer)
    name = _short(_tokenizer_key(data, sources))
    folder = cache_folder(data) / f"tokenizer-{name}"

    def make(temporary: Path) -> None:
        sample = [unit for source in sources for unit in source.units()]
        tokenizer = make_tokenizer(
            data,
            lambda: _texts(sample, ("train",), SAMPLE_BYTES),
            lambda: _texts(sample, SPLITS),
            say=lambda line: print(line, file=sys.stderr) if progress else None,
        )
        tokenizer.save(temporary)

    _made_once(folder, make, lambda folder: folder.is_dir(), progress)
    return load_tokenizer(folder), name


def stored(data: DataConfig, source: Source, tokenizer: Tokenizer, name: str, seq_len: int, progress: bool) -> Corpus:
    """Returns the corpus of a source: opens its token store, and makes the store first if it does not exist.

    Any number of processes may call this at once; one of them makes the store, the others wait.

    Args:
      name: the hash that identifies the tokenizer.

    Raises:
      UserError: the data is unreadable or too short, or the store cannot be written.
    """
    key = {"shape": SHAPE, "source": source.key, "tokenizer": name}
    if source.masked and tokenizer.specials:
        key["markup"] = MARKUP
    folder = cache_folder(data) / _short(key)

    def make(temporary: Path) -> None:
        _fill(temporary, source, tokenizer, data, seq_len, progress)
        if open_source(data).key != source.key:
            raise UserError(f"{named(data)}: files changed while they were read; run it again")

    _made_once(folder, make, lambda folder: (folder / "manifest.json").is_file(), progress)
    return open_store(folder)


def _short(key: dict[str, Any]) -> str:
    """Returns a hash of a JSON object, 16 hex digits."""
    return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]


def _tokenizer_key(data: DataConfig, sources: list[Source]) -> dict[str, Any]:
    """Returns everything that shapes a tokenizer made from a corpus."""
    key = {"shape": SHAPE, "kind": data.tokenizer, "sources": [source.key for source in sources]}
    return key | (TOKENIZERS[data.tokenizer].corpus_key(data) or {})


def _saved_hash(tokenizer: Tokenizer) -> str:
    """Returns a hash of the files that a tokenizer saves and of the version of the library that reads them."""
    with temporary_folder() as folder:
        tokenizer.save(folder)
        files = {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.iterdir()}
    library = tokenizer.library
    return _short({"files": files, "version": importlib.metadata.version(library) if library else None})


def _no_texts() -> Iterator[str]:
    return iter(())


def _texts(units: list[Unit], splits: tuple[Split, ...], limit: int | None = None) -> Iterator[str]:
    """Yields the texts of all units.

    With `limit`, each unit stops after the document that reaches max(limit // len(units), 2^20) characters.
    """
    for unit in units:
        left = None if limit is None else max(limit // len(units), 1 << 20)
        for item in unit.read():
            if isinstance(item, Document) and item.split in splits:
                yield item.text
                if left is not None and (left := left - len(item.text)) <= 0:
                    break


def _made_once(folder: Path, make: Callable[[Path], None], whole: Callable[[Path], bool], progress: bool) -> None:
    """Makes a folder unless `whole` says that it is complete: `make` fills <folder>.building, which is then renamed."""
    if whole(folder):
        return
    cache, temporary = folder.parent, folder.with_name(f"{folder.name}.building")
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with _locked(cache / f"{folder.name}.lock", progress):
            if whole(folder):
                return
            if folder.exists():
                raise UserError(
                    f"{folder}: not a complete token store; allowed: a complete one, or nothing there (move it away)"
                )
            temporary.mkdir(exist_ok=True)
            tidy = functools.partial(_remove_empty, temporary)
            signals.at_stop(tidy)
            try:
                make(temporary)
                _sync(temporary)
                os.rename(temporary, folder)
                _sync_folder(cache)
            except BaseException as error:
                # Bad data stays bad: remove its shards. After other errors or a signal, finished shards are kept.
                if isinstance(error, UserError) and not isinstance(error, Unfinished):
                    shutil.rmtree(temporary, ignore_errors=True)
                tidy()
                raise
            finally:
                signals.forget(tidy)
    except OSError as error:
        kept = f"; finished shards are kept in {temporary}" if temporary.exists() else ""
        raise UserError(f"data.cache_dir {cache}: cannot be written ({error.strerror or error}){kept}") from error


def _remove_empty(temporary: Path) -> None:
    """Removes a folder that holds no finished shard."""
    if not any(temporary.glob("?????.json")):
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def _locked(path: Path, progress: bool) -> Iterator[None]:
    """Holds a lock file; waits up to LOCK_LIMIT seconds for another process to release it."""
    lock = filelock.FileLock(path)
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        if progress:
            print(
                f"waiting for the process that makes {path.with_suffix('')} (at most {LOCK_LIMIT // 3600} h)",
                file=sys.stderr,
            )
        try:
            lock.acquire(timeout=LOCK_LIMIT)
        except filelock.Timeout:
            raise UserError(
                f"{path}: another process has held this lock for {LOCK_LIMIT // 3600} h; end that one or wait again"
            ) from None
    try:
        yield
    finally:
        lock.release()


def _fill(folder: Path, source: Source, tokenizer: Tokenizer, data: DataConfig, seq_len: int, progress: bool) -> None:
    """Writes a token store into `folder`; keeps the shards that an earlier run finished there."""
    (folder / "tokenizer").mkdir(exist_ok=True)
    tokenizer.save(folder / "tokenizer")
    try:
        units = source.units()
    except OSError as error:
        raise UserError(f"{error.filename}: unreadable ({error.strerror})") from error
    with track("tokenizing", source.num_bytes, progress) as bar:
        shards = make_shards(folder, units, tokenizer, source.masked, bar)
    totals = {s: {k: sum(shard[s][k] for shard in shards) for k in COUNTS} for s in SPLITS}
    skipped = source.skipped + sum(shard["skipped"] for shard in shards)
    if skipped and progress:
        what = "file or record" if skipped == 1 else "files or records"
        print(f"skipped {skipped} unusable {what}", file=sys.stderr)
        reasons = [reason for shard in shards for reason in shard["reasons"]][:SHOWN_REASONS]
        if reasons and skipped > len(reasons):
            reasons.append(f"... and {skipped - len(reasons)} more")
        for reason in reasons:
            print(f"  {reason}", file=sys.stderr)
    check_lengths(data, seq_len, totals["train"]["tokens"], totals["val"]["tokens"])
    manifest = {
        "format": FORMAT,
        "dtype": token_dtype(tokenizer.vocab_size).str,
        "vocab_size": tokenizer.vocab_size,
        "source": source.name,
        "masked": source.masked,
        "skipped": skipped,
        "shards": shards,
    }
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n", "utf-8")
    for file in folder.glob("?????.json"):
        file.unlink()


def _sync(folder: Path) -> None:
    """Makes all files and names in a folder durable (fsync); the files of shards already are."""
    for path in (p for p in folder.rglob("*") if p.is_file() and p.suffix not in (".bin", ".starts", ".mask")):
        with path.open("rb") as file:
            os.fsync(file.fileno())
    for path in (*(p for p in folder.rglob("*") if p.is_dir()), folder):
        _sync_folder(path)


def _sync_folder(folder: Path) -> None:
    """Makes the names in a folder durable (fsync)."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
