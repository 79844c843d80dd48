"""Measures how fast token stores are made, beside the tokenizer's library alone; a part of bench_data.py."""

import itertools
import multiprocessing
import os
import resource
import shutil
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

from jaxlm.config import SOURCES, Config, DataConfig, mixture
from jaxlm.data.build import BATCH_CHARACTERS, SPLITS, num_processes
from jaxlm.data.sources.documents import Document, Unit
from jaxlm.data.sources.files import grouped
from jaxlm.data.sources.opening import open_source
from jaxlm.data.store import stored, stored_tokenizer
from jaxlm.data.tokenizers import to_bytes
from jaxlm.data.tokenizers.sentencepiece import CHUNK
from jaxlm.host.workers import apart, deaf, no_main, workers

ENOUGH_BYTES = 100_000_000  # size of a corpus; with less, starting processes takes much of the time

Library = Literal["sentencepiece", "tokenizers"]


class Built(NamedTuple):
    """Measurements of building token stores."""

    seconds: float
    documents: int
    bytes: int
    tokens: int
    processes: int  # at the same time
    peak_bytes: int  # memory of the largest process


class Encoded(NamedTuple):
    """Measurements of a tokenizer's library, alone on the same texts."""

    seconds: float
    tokens: int


def text_parts(data: DataConfig) -> list[DataConfig]:
    """Returns the sources of text; several in a mixture."""
    parts = [part for _, part in mixture(data)] if data.mixture else [data]
    return [part for part in parts if not SOURCES[part.source].ids]


def measure_preparation(config: Config, rounds: int) -> dict[str, Any]:
    """Measures with the tokenizer in `data.tokenizer_path`. Leaves the last stores in `data.cache_dir`."""
    parts, folder = text_parts(config.data), Path(config.data.tokenizer_path)
    library = library_of(folder)
    builds: list[Built] = []
    alone: list[Encoded] = []

    def build() -> None:
        shutil.rmtree(config.data.cache_dir, ignore_errors=True)
        builds.append(build_stores(parts, config.seq_len))

    def encode() -> None:
        if library:
            seconds, tokens = zip(*(apart(encode_alone, library, folder, part) for part in parts), strict=True)
            alone.append(Encoded(sum(seconds), sum(tokens)))

    for i in range(rounds):
        for run in (build, encode) if i % 2 else (encode, build):
            run()
        if not i and builds[0].bytes < ENOUGH_BYTES:
            print(
                f"jaxlm: a corpus of {builds[0].bytes / 1e6:.1f} MB; below {ENOUGH_BYTES / 1e6:.0f} MB, starting "
                "processes and the machine's noise hide how fast texts are tokenized",
                file=sys.stderr,
            )
        more = f" · {library} alone {alone[-1].seconds:.2f} s" if library else ""
        print(f"round {i + 1}/{rounds} · store {builds[-1].seconds:.2f} s{more}", flush=True)
    return _preparation(library, builds, alone)


def _preparation(library: Library | None, builds: list[Built], alone: list[Encoded]) -> dict[str, Any]:
    first, seconds = builds[0], statistics.median(b.seconds for b in builds)
    result = {
        "documents": first.documents,
        "bytes": first.bytes,
        "tokens": first.tokens,
        "processes": first.processes,
        "peak_process_bytes": max(b.peak_bytes for b in builds),
        "seconds": seconds,
        "tokens_per_second": first.tokens / seconds,
        "mb_per_second": first.bytes / seconds / 1e6,
        "library": library,
        "library_tokens": None,
        "library_mb_per_second": None,
        "over_library": None,
    }
    line = (
        f"preparation · {first.bytes / 1e6:.1f} MB · processes: {first.processes}, up to "
        f"{result['peak_process_bytes'] / 1e6:.0f} MB each · {result['mb_per_second']:.2f} MB/s, "
        f"{result['tokens_per_second'] / 1e6:.2f} million tokens/s"
    )
    if alone:
        result["library_tokens"] = alone[0].tokens
        result["library_mb_per_second"] = first.bytes / statistics.median(a.seconds for a in alone) / 1e6
        result["over_library"] = statistics.median(a.seconds / b.seconds for a, b in zip(alone, builds, strict=True))
        line += f" · {library} alone {result['library_mb_per_second']:.2f} MB/s · ratio {result['over_library']:.2f}"
    print(line, flush=True)
    return result


def save_tokenizer(data: DataConfig, folder: Path) -> None:
    """Makes or loads the tokenizer of a configuration, and saves it."""
    sources = [open_source(part) for part in text_parts(data)]
    stored_tokenizer(data, sources, True)[0].save(folder)


def build_stores(parts: list[DataConfig], seq_len: int) -> Built:
    """Makes each store in a process of its own, because peak memory is known for a process's whole life only."""
    stores = [apart(build_store, part, seq_len) for part in parts]
    *sums, processes, peaks = zip(*stores, strict=True)
    return Built(*map(sum, sums), processes=max(processes), peak_bytes=max(peaks))


def build_store(data: DataConfig, seq_len: int) -> Built:
    start = time.perf_counter()
    source = open_source(data)
    tokenizer, name = stored_tokenizer(data, [source], False)
    corpus = stored(data, source, tokenizer, name, seq_len, False)
    seconds = time.perf_counter() - start
    documents, size, tokens = (sum(corpus.facts[s][k] for s in SPLITS) for k in ("documents", "bytes", "tokens"))
    processes = min(num_processes(), len(source.units()))
    who = resource.RUSAGE_CHILDREN if processes > 1 else resource.RUSAGE_SELF  # one unit is tokenized in this process
    peak = resource.getrusage(who).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return Built(seconds, documents, size, tokens, processes, peak)


def library_of(folder: Path) -> Library | None:
    """Returns the library of a saved tokenizer; None if it needs none."""
    if (folder / "sentencepiece.model").exists():
        return "sentencepiece"
    return "tokenizers" if (folder / "tokenizer.json").exists() else None


def encode_alone(library: Library, folder: Path, data: DataConfig) -> Encoded:
    """Gives each process a share of the texts. All begin to encode when the last one has its share."""
    units = open_source(data).units()
    count = min(num_processes(), len(units))
    with workers(count, _begin, multiprocessing.get_context("spawn").Barrier(count)) as pool:
        with no_main(), deaf():
            futures = [pool.submit(encode_share, library, folder, units, i, count) for i in range(count)]
        starts, ends, tokens = zip(*(future.result() for future in futures), strict=True)
    return Encoded(max(ends) - min(starts), sum(tokens))


def encode_share(library: Library, folder: Path, units: list[Unit], index: int, count: int) -> tuple[float, float, int]:
    """Encodes a share. Returns its start and end, on a clock that all processes share, and the number of tokens."""
    try:
        encode = _encoder(library, folder, (os.cpu_count() or 1) if count == 1 else 1)
        documents = (d for unit in units for d in unit.read() if isinstance(d, Document))
        texts = (to_bytes(d.text).decode("utf-8", "replace") for d in documents)  # no library accepts surrogates
        if library == "sentencepiece":  # it is slower with long texts
            texts = (chunk for text in texts for chunk in CHUNK.findall(text))
        batches = grouped(itertools.islice(texts, index, None, count), len, BATCH_CHARACTERS)
    except BaseException:
        _barrier.abort()
        raise
    _barrier.wait()
    start = time.perf_counter()
    tokens = sum(map(encode, batches))
    return start, time.perf_counter(), tokens


def _encoder(library: Library, folder: Path, threads: int) -> Callable[[list[str]], int]:
    """Returns a function that encodes texts and returns the number of tokens."""
    if library == "sentencepiece":
        import sentencepiece

        processor: Any = sentencepiece.SentencePieceProcessor(model_file=str(folder / "sentencepiece.model"))
        return lambda texts: sum(map(len, processor.encode(texts, num_threads=threads)))
    import tokenizers

    os.environ["TOKENIZERS_PARALLELISM"] = "true" if threads > 1 else "false"
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    return lambda texts: sum(map(len, tokenizer.encode_batch_fast(texts, add_special_tokens=False)))


_barrier: Any


def _begin(barrier: Any) -> None:
    global _barrier
    _barrier = barrier
