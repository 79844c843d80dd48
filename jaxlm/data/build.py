"""Making the shards of a token store: units of a corpus are read and tokenized by processes, side by side.

A shard is whole once its .json is there; what a run that was stopped left whole is not made again.
"""

import contextlib
import dataclasses
import hashlib
import json
import multiprocessing
import os
import signal
import sys
import threading
import types
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import connection
from pathlib import Path
from typing import Any, get_args

import numpy as np

from jaxlm.config import UserError
from jaxlm.data.documents import Document, Skipped, Split, Unit
from jaxlm.data.markup import encode_marked
from jaxlm.data.progress import Progress
from jaxlm.data.tokenizers import Tokenizer, load_tokenizer, to_bytes

SPLITS: tuple[Split, ...] = get_args(Split)
BATCH_CHARACTERS = 1 << 22  # tokenized at a time
REASONS = 100  # of what is skipped in a unit, that are kept


class Unfinished(UserError):
    """What is done is worth keeping: another run may get further."""


def num_processes() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def make_shards(folder: Path, units: list[Unit], tokenizer: Tokenizer, masked: bool, bar: Progress) -> list[dict]:
    """Writes a shard for each unit into a folder that has the tokenizer; gives their facts.

    Raises:
      UserError: a document is no good, or the memory was not enough.
      OSError: a file cannot be written.
    """
    for split in SPLITS:
        (folder / split).mkdir(exist_ok=True)
    facts = {i: found for i in range(len(units)) if (found := _whole(folder, i, tokenizer))}
    for found in facts.values():
        bar.advance(_num_bytes(found))
    left = [i for i in range(len(units)) if i not in facts]
    if len(left) <= 1 or num_processes() == 1:
        for i in left:  # encodes with all cores
            facts[i] = _make_shard(folder, i, units[i], tokenizer, masked)
            bar.advance(_num_bytes(facts[i]))
    else:
        with _workers(folder, min(num_processes(), len(left))) as pool:
            with _no_main(), _deaf():
                futures = {pool.submit(_work, folder, i, units[i], masked): i for i in left}
            for future in as_completed(futures):
                facts[futures[future]] = future.result()
                bar.advance(_num_bytes(future.result()))
    return [facts[i] for i in range(len(units))]


def _whole(folder: Path, index: int, tokenizer: Tokenizer) -> dict[str, Any] | None:
    """The facts of a shard that an earlier run left whole; None where it did not."""
    try:
        facts = json.loads(_facts(folder, index).read_text())
        for split in SPLITS:
            for suffix in facts[split]["sha256"]:
                each = {"bin": token_dtype(tokenizer.vocab_size).itemsize, "starts": 8, "mask": 1}[suffix]
                count = facts[split]["documents" if suffix == "starts" else "tokens"]
                if (folder / split / f"{index:05}.{suffix}").stat().st_size != each * count:
                    return None
        counts = [facts["skipped"], *(facts[split]["bytes"] for split in SPLITS)]
        return facts if all(type(n) is int for n in counts) and isinstance(facts["reasons"], list) else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


def _num_bytes(facts: dict) -> int:
    return sum(facts[split]["bytes"] for split in SPLITS)


@contextlib.contextmanager
def _workers(folder: Path, count: int) -> Iterator[ProcessPoolExecutor]:
    """Processes that end with this one, at once where it is stopped or fails."""
    others = set(multiprocessing.active_children())
    context = multiprocessing.get_context("spawn")  # a fork of a process with threads may hang
    pool = ProcessPoolExecutor(count, mp_context=context, initializer=_begin, initargs=(folder,))
    try:
        yield pool
        pool.shutdown()
    except BrokenProcessPool as error:
        raise Unfinished(f"{folder}: a process that tokenizes was killed, as it is when memory runs out; what is done "
                         "is kept, run it again with more memory, or fewer cores (taskset)") from error  # fmt: skip
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        for process in set(multiprocessing.active_children()) - others:
            process.terminate()
            process.join()


@contextlib.contextmanager
def _no_main() -> Iterator[None]:
    """Processes that are started do not import the program: they need nothing of it, and a script without
    `if __name__ == "__main__"` would do again in each what it does.
    """
    program = sys.modules["__main__"]
    sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = program


@contextlib.contextmanager
def _deaf() -> Iterator[None]:
    """Processes that are started hear no Ctrl-C, from their first moment on: this one ends them."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


_tokenizer: Tokenizer


def end_with_parent() -> None:
    """Has this process end when the one that started it does, also where that is killed."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _begin(folder: Path) -> None:
    """Prepares a process that works; it ends with its parent, also where that is killed."""
    global _tokenizer
    end_with_parent()
    _tokenizer = load_tokenizer(folder / "tokenizer")
    _tokenizer.num_threads = 1


def _work(folder: Path, index: int, unit: Unit, masked: bool) -> dict[str, Any]:
    return _make_shard(folder, index, unit, _tokenizer, masked)


def _facts(folder: Path, index: int) -> Path:
    return folder / f"{index:05}.json"


def _make_shard(folder: Path, index: int, unit: Unit, tokenizer: Tokenizer, masked: bool) -> dict[str, Any]:
    """Tokenizes a unit into a shard of each split; gives their numbers of documents, bytes and tokens, and hashes."""
    skipped: list[str] = []
    count = 0
    with contextlib.ExitStack() as stack:
        shards = {s: stack.enter_context(_Shard(folder / s / f"{index:05}", tokenizer, masked)) for s in SPLITS}
        for batch in _batches(unit.read()):
            documents = [item for item in batch if isinstance(item, Document)]
            reasons = [item.reason for item in batch if isinstance(item, Skipped)]
            skipped, count = (skipped + reasons)[:REASONS], count + len(reasons)
            encoded = encode_marked(tokenizer, [d.text for d in documents], [d.markup for d in documents])
            for document, ids in zip(documents, encoded, strict=True):
                shards[document.split].add(document, ids)
    facts = {split: shards[split].facts() for split in SPLITS} | {"skipped": count, "reasons": skipped}
    file = _facts(folder, index)
    temporary = file.with_suffix(".tmp")
    with temporary.open("w", encoding="utf-8") as out:
        json.dump(facts, out)
        out.flush()
        os.fsync(out.fileno())
    os.replace(temporary, file)
    return facts


def token_dtype(vocab_size: int) -> np.dtype:
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")


@dataclasses.dataclass
class _Shard:
    """Files that grow: ids (.bin), where documents start (.starts, uint64), and what is learned (.mask)."""

    path: Path
    tokenizer: Tokenizer
    masked: bool

    def __enter__(self) -> "_Shard":
        self.dtype = token_dtype(self.tokenizer.vocab_size)
        self.bos = np.array([self.tokenizer.bos_id], self.dtype).tobytes()
        self.documents = self.bytes = self.tokens = 0
        self.files = {
            s: self.path.with_suffix(f".{s}").open("wb") for s in ("bin", "starts", "mask")[: 2 + self.masked]
        }
        self.digests = {suffix: hashlib.sha256() for suffix in self.files}
        return self

    def __exit__(self, kind: object, *rest: object) -> None:
        with contextlib.ExitStack() as stack:
            for file in self.files.values():
                stack.enter_context(file)
            for file in self.files.values() if kind is None else ():
                file.flush()
                os.fsync(file.fileno())

    def add(self, document: Document, ids: np.ndarray) -> None:
        if document.first:
            self._write("starts", np.array([self.tokens], "<u8").tobytes())
        self._write("bin", (self.bos if document.first else b"") + ids.astype(self.dtype).tobytes())
        if self.masked:
            # A bos is learned: it ends the document before it, and every one ends with what is learned.
            self._write("mask", b"\1" * document.first + bytes([document.predicted]) * len(ids))
        self.documents += document.first
        self.bytes += self._text_bytes(document, ids)
        self.tokens += document.first + len(ids)

    def _text_bytes(self, document: Document, ids: np.ndarray) -> int:
        if document.markup and self.tokenizer.specials:  # some of which may stand for no text
            return sum(len(self.tokenizer.pieces[i]) for i in ids)
        return len(document.text) if document.text.isascii() else len(to_bytes(document.text))

    def _write(self, suffix: str, data: bytes) -> None:
        self.files[suffix].write(data)
        self.digests[suffix].update(data)

    def facts(self) -> dict[str, Any]:
        sha256 = {suffix: digest.hexdigest() for suffix, digest in self.digests.items()}
        return {"documents": self.documents, "bytes": self.bytes, "tokens": self.tokens, "sha256": sha256}


def _batches(items: Iterator[Document | Skipped]) -> Iterator[list[Document | Skipped]]:
    """What is read in lists of about BATCH_CHARACTERS."""
    batch, size = [], 0
    for item in items:
        batch.append(item)
        size += len(item.text) if isinstance(item, Document) else len(item.reason)
        if size >= BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
