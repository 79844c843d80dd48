"""Makes the shards of a token store: parallel processes read and tokenize the units of a corpus.

A shard is complete once its .json exists. Shards that a stopped run completed are not made again.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
from collections.abc import Iterator
from concurrent.futures import as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, get_args

import numpy as np

from jaxlm.config import UserError
from jaxlm.data.progress import Progress
from jaxlm.data.sources.documents import Document, Skipped, Split, Unit
from jaxlm.data.tokenizers import Tokenizer, load_tokenizer, to_bytes
from jaxlm.data.tokenizers.markup import encode_marked
from jaxlm.host.workers import deaf, no_main, workers

SPLITS: tuple[Split, ...] = get_args(Split)
BATCH_CHARACTERS = 1 << 22  # about how many are tokenized in one call
REASONS = 100  # how many reasons for skipping are kept for each unit


class Unfinished(UserError):
    """Tokenizing failed, but the finished shards are worth keeping: another run may get further."""


def num_processes() -> int:
    """Returns the number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def make_shards(folder: Path, units: list[Unit], tokenizer: Tokenizer, masked: bool, bar: Progress) -> list[dict]:
    """Writes a shard for each unit into a folder that already holds the tokenizer; returns their facts, by unit.

    Raises:
      UserError: a document is unusable, or memory ran out.
      OSError: a file cannot be written.
    """
    for split in SPLITS:
        (folder / split).mkdir(exist_ok=True)
    facts = {i: found for i in range(len(units)) if (found := _whole(folder, i, tokenizer))}
    for found in facts.values():
        bar.advance(_num_bytes(found))
    left = [i for i in range(len(units)) if i not in facts]
    if len(left) <= 1 or num_processes() == 1:
        for i in left:  # here, the tokenizer itself uses all cores
            facts[i] = _make_shard(folder, i, units[i], tokenizer, masked)
            bar.advance(_num_bytes(facts[i]))
    else:
        try:
            with workers(min(num_processes(), len(left)), _begin, folder) as pool:
                with no_main(), deaf():
                    futures = {pool.submit(_work, folder, i, units[i], masked): i for i in left}
                for future in as_completed(futures):
                    facts[futures[future]] = future.result()
                    bar.advance(_num_bytes(future.result()))
        except BrokenProcessPool as error:
            raise Unfinished(
                f"{folder}: a tokenizing process was killed, as happens when memory runs out; finished shards are kept;"
                " run again with more memory or fewer cores (taskset)"
            ) from error
    return [facts[i] for i in range(len(units))]


def _whole(folder: Path, index: int, tokenizer: Tokenizer) -> dict[str, Any] | None:
    """Returns the facts of a shard that an earlier run completed, if its files have the right sizes; otherwise None."""
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
    """Returns the bytes of text in a shard, over all splits."""
    return sum(facts[split]["bytes"] for split in SPLITS)


_tokenizer: Tokenizer


def _begin(folder: Path) -> None:
    """Prepares a worker process."""
    global _tokenizer
    _tokenizer = load_tokenizer(folder / "tokenizer")
    _tokenizer.num_threads = 1


def _work(folder: Path, index: int, unit: Unit, masked: bool) -> dict[str, Any]:
    return _make_shard(folder, index, unit, _tokenizer, masked)


def _facts(folder: Path, index: int) -> Path:
    """Returns the path of a shard's .json file."""
    return folder / f"{index:05}.json"


def _make_shard(folder: Path, index: int, unit: Unit, tokenizer: Tokenizer, masked: bool) -> dict[str, Any]:
    """Tokenizes a unit into one shard per split; returns their facts (see `_Shard.facts`) and what was skipped."""
    skipped: list[str] = []
    count = 0
    with contextlib.ExitStack() as stack:
        shards = {s: stack.enter_context(_Shard(folder / s / f"{index:05}", tokenizer, masked)) for s in SPLITS}
        for batch in _batches(unit.read()):
            documents = [item for item in batch if isinstance(item, Document)]
            reasons = [item.reason for item in batch if isinstance(item, Skipped)]
            skipped, count = (skipped + reasons)[:REASONS], count + len(reasons)
            encoded = encode_marked(tokenizer, documents)
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
    """Returns the dtype of a store's token ids: uint16 if all ids fit, otherwise uint32."""
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")


@dataclasses.dataclass
class _Shard:
    """The files of a shard, written document by document.

    They hold token ids (.bin), the index of each document's first token (.starts, uint64) and, if `masked`, whether
    each id counts towards the loss as a target (.mask, one byte).
    """

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
            # A bos counts towards the loss: it ends the document before it, which ends with an answer.
            self._write("mask", b"\1" * document.first + bytes([document.predicted]) * len(ids))
        self.documents += document.first
        self.bytes += self._text_bytes(document, ids)
        self.tokens += document.first + len(ids)

    def _text_bytes(self, document: Document, ids: np.ndarray) -> int:
        if document.markup and self.tokenizer.specials:  # special tokens may stand for no text
            return sum(len(self.tokenizer.pieces[i]) for i in ids)
        return len(document.text) if document.text.isascii() else len(to_bytes(document.text))

    def _write(self, suffix: str, data: bytes) -> None:
        self.files[suffix].write(data)
        self.digests[suffix].update(data)

    def facts(self) -> dict[str, Any]:
        """Returns the numbers of documents, bytes of text and tokens, and the sha256 of each file by its suffix."""
        sha256 = {suffix: digest.hexdigest() for suffix, digest in self.digests.items()}
        return {"documents": self.documents, "bytes": self.bytes, "tokens": self.tokens, "sha256": sha256}


def _batches(items: Iterator[Document | Skipped]) -> Iterator[list[Document | Skipped]]:
    """Groups items into lists of about BATCH_CHARACTERS."""
    batch, size = [], 0
    for item in items:
        batch.append(item)
        size += len(item.text) if isinstance(item, Document) else len(item.reason)
        if size >= BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
