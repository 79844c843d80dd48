"""How fast a configuration's data is prepared and fed: preparation, feeding and waiting, each a line of text.

Preparation is the making of a token store in a cache that is thrown away, beside the tokenizer's library alone on the
same texts, already in memory, by as many processes. Feeding is how fast batches come when nothing else is done, and how
soon the first one far into a run. Waiting is the share of a training loop's time that it spends in taking batches,
when steps take a given time: asleep, and in a computation on all devices.

What is compared runs in turns, round by round, and medians are reported. The last line of output is one JSON object.
"""

import contextlib
import dataclasses
import itertools
import json
import multiprocessing
import os
import resource
import shutil
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import connection
from pathlib import Path
from typing import Any, NamedTuple

from jaxlm import cli, runtime
from jaxlm.config import Config, DataConfig, UserError, mixture
from jaxlm.data import Corpus, TrainOrder, prepare, train_stream
from jaxlm.data.build import BATCH_CHARACTERS, num_processes
from jaxlm.data.sentencepiece_tokenizer import CHUNK
from jaxlm.data.sources import Document, Unit, open_source
from jaxlm.data.store import stored, stored_tokenizer
from jaxlm.data.stream import BLOCK, PATIENCE, Batch, TrainStream
from jaxlm.data.tf_import import import_tensorflow

ENOUGH_BYTES = 100_000_000  # of a corpus: beside the work on fewer, the start of the processes is long
END = 2 * 10**9  # steps: the batches never end
FAR = 10**9  # the step to go on from
FEED_SECONDS = 0.5  # of a round of feeding, at least
MAX_MS = 60_000


def main(argv: list[str]) -> int:
    parser = cli.Parser(
        prog="bench.py data", description=__doc__, allow_abbrev=False, epilog="--config.KEY=VALUE as for training."
    )
    parser.add_argument("--config", required=True, metavar="FILE")
    parser.add_argument("--rounds", type=int, default=3, help="(default: 3)")
    parser.add_argument("--steps", type=int, default=200, help="batches a round, at least (default: 200)")
    parser.add_argument(
        "--compute_ms", type=float, default=20.0, metavar="MS", help="length of a step to wait in (default: 20)"
    )
    args, overrides = parser.parse_known_args(argv)
    config = cli.load(cli.user_path("--config", args.config), overrides)
    for name in ("rounds", "steps"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name} is {getattr(args, name)}; allowed: 1 or more")
    if not 0 < args.compute_ms <= MAX_MS:
        raise UserError(f"--compute_ms is {args.compute_ms}; allowed: more than 0, at most {MAX_MS}")
    runtime.check_batch(config, config.parallel.devices or 1, 1)
    config.steps = END
    result: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        config.data.cache_dir = folder
        result["preparation"] = measure_preparation(config, Path(folder), args.rounds)  # while this process is small
        corpus = prepare(config, progress=False)
        result["feeding"] = measure_feeding(corpus, config, args.rounds, args.steps)
        runtime.configure_jax(config, 1)
        result["waiting"] = measure_waiting(corpus, config, args.rounds, args.steps, args.compute_ms / 1e3)
    print(json.dumps(result))
    return 0


# Preparation


class Built(NamedTuple):
    """A token store."""

    seconds: float
    documents: int
    bytes: int
    tokens: int
    peak_bytes: int  # memory of the largest process that tokenized


class Bare(NamedTuple):
    """What a tokenizer's library did."""

    name: str
    seconds: float
    tokens: int


def measure_preparation(config: Config, folder: Path, rounds: int) -> dict[str, Any] | None:
    """None where there is no text. Has `config.data` name the tokenizer, and the cache of the last store, in `folder`.

    Each store and each library has a process of its own: what a process and those that it started took of memory is
    only known of all its life.
    """
    parts = [part for part in ([p for _, p in mixture(config.data)] if config.data.mixture else [config.data])
             if part.source not in ("tokens", "synthetic")]  # fmt: skip
    if not parts:
        print("preparation · none: this data is token ids already")
        return None
    (folder / "tokenizer").mkdir()
    _apart(save_tokenizer, config.data, parts, folder / "tokenizer")
    config.data.tokenizer_path = str(folder / "tokenizer")
    builds: list[Built] = []
    bares: list[Bare] = []
    processes = 0
    for i in range(rounds):
        cache = Path(config.data.cache_dir)
        if i:
            shutil.rmtree(cache)
        config.data.cache_dir = str(folder / f"round-{i}")
        mine = [dataclasses.replace(p, cache_dir=config.data.cache_dir, tokenizer_path=config.data.tokenizer_path)
                for p in parts]  # fmt: skip

        def ours(mine: list[DataConfig] = mine) -> None:
            stores = [_apart(build_store, part, config.seq_len) for part in mine]
            *sums, peaks = zip(*stores, strict=True)
            builds.append(Built(*map(sum, sums), max(peaks)))

        def bare(mine: list[DataConfig] = mine) -> None:
            nonlocal processes
            processes, found = _apart(run_library, mine, folder / "tokenizer")
            bares.extend([found] if found else [])

        for run in (ours, bare) if i % 2 else (bare, ours):
            run()
        print(f"round {i + 1}/{rounds} · store {builds[-1].seconds:.2f} s"
              + f" · {bares[-1].name} alone {bares[-1].seconds:.2f} s" * bool(bares))  # fmt: skip
    return _preparation(builds, bares, processes)
