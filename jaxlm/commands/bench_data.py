"""Measures how fast a configuration's data is prepared and fed, in three parts.

Preparation: makes the token store in a temporary cache, beside the tokenizer's library alone, which gets the same texts
from memory and as many processes. Target: 0.9 of its speed. Feeding: takes batches with nothing else to do, and the
first batch far into a run. Targets: 20 million tokens/s with sequences of 1024 tokens on two cores, and 10 ms. Waiting:
measures the share of its time that the training loop spends on taking batches, when a step takes --compute_ms, asleep
or computing on all devices. Target: at most 1%.

What is compared takes turns, and the results are medians over the rounds. The last line of output is one JSON object.
"""

import contextlib
import dataclasses
import json
import statistics
import time
from collections.abc import Callable
from typing import Any, Literal, cast

from jaxlm.commands.bench_tokenizing import measure_preparation, save_tokenizer, text_parts
from jaxlm.config import Config, UserError, cli, files
from jaxlm.config.paths import user_path
from jaxlm.data import Corpus, Share, TrainOrder, TrainStream, prepare, train_stream
from jaxlm.data.stream import BLOCK, PATIENCE, HostBatch
from jaxlm.data.tf_import import import_tensorflow
from jaxlm.host import runtime
from jaxlm.host.temporary import temporary_folder
from jaxlm.host.workers import apart

FAR, END = 10**9, 2 * 10**9  # steps: one far into a run, and one that is never reached
FEED_SECONDS = 0.5  # shortest duration of a round of feeding
MAX_MS = 60_000

Backend = Literal["auto", "tf", "thread"]


def main(argv: list[str]) -> int:
    parser = cli.config_parser("jaxlm bench data", __doc__)
    parser.add_argument("--rounds", type=int, default=3, help="number of rounds (default: 3)")
    parser.add_argument("--steps", type=int, default=200, help="least number of batches per round (default: 200)")
    parser.add_argument(
        "--compute_ms",
        type=float,
        default=20.0,
        metavar="MS",
        help="duration of a step while measuring the wait (default: 20)",
    )
    args, overrides = parser.parse_known_args(argv)
    config = files.load(user_path("--config", args.config), overrides)
    for name in ("rounds", "steps"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name} is {getattr(args, name)}; allowed: 1 or more")
    if not 0 < args.compute_ms <= MAX_MS:
        raise UserError(f"--compute_ms is {args.compute_ms}; allowed: more than 0, at most {MAX_MS}")
    runtime.check_batch(config, config.parallel.devices, 1)
    config.steps = END
    with temporary_folder() as folder:
        config.data.cache_dir = f"{folder}/cache"
        preparation = None
        # Before jax and tensorflow are imported, because a new process starts as large as this one.
        if text_parts(config.data):
            apart(save_tokenizer, config.data, folder)
            config.data.tokenizer_path = str(folder)
            preparation = measure_preparation(config, args.rounds)
        corpus = prepare(config, progress=False)
        feeding = measure_feeding(corpus, config, args.rounds, args.steps)
        runtime.configure_jax(config, 1)
        waiting = measure_waiting(corpus, config, args.rounds, args.steps, args.compute_ms)
    print(json.dumps({"preparation": preparation, "feeding": feeding, "waiting": waiting}))
    return 0


# Feeding


def measure_feeding(corpus: Corpus, config: Config, rounds: int, steps: int) -> dict[str, Any]:
    """Measures both packings, if the starts of documents are known; pairs for an encoder have only one."""
    orders = {}
    both = corpus.train.starts is not None and not config.model.encoder_layers
    for packing in ("concat", "document") if both else (config.data.packing,):
        data = dataclasses.replace(config.data, packing=packing)
        orders[packing] = TrainOrder(corpus, dataclasses.replace(config, data=data))
    measures: dict[str, Callable[[TrainOrder], float]] = {
        "thread_tokens_per_second": lambda order: feed(order, config, "thread", steps),
        "seek_ms": lambda order: seek(order, config, "auto"),  # as a run does
        "thread_seek_ms": lambda order: seek(order, config, "thread"),
    }
    if _has_tensorflow():
        measures["tf_tokens_per_second"] = lambda order: feed(order, config, "tf", steps)
        measures["tf_seek_ms"] = lambda order: seek(order, config, "tf")
    found: dict[tuple[str, str], list[float]] = {(p, m): [] for p in orders for m in measures}
    for i in range(rounds):
        for packing, name in list(found)[:: 1 if i % 2 else -1]:
            found[packing, name].append(measures[name](orders[packing]))
    result: dict[str, Any] = {"seq_len": config.seq_len, "batch_size": config.batch_size}
    result |= {"concat": None, "document": None}
    for packing in orders:
        medians = {name: statistics.median(found[packing, name]) for name in measures}
        result[packing] = {"tf_tokens_per_second": None, "tf_seek_ms": None} | medians
        shown = " · ".join(_show(name, value) for name, value in medians.items())
        print(f"feeding · {packing}, {config.batch_size} x {config.seq_len} tokens · {shown}", flush=True)
    return result


def _show(name: str, value: float) -> str:
    if name.endswith("_ms"):
        return f"{name.removesuffix('_ms')} {value:.1f} ms"
    return f"{name.removesuffix('_tokens_per_second')} {value / 1e6:.1f} million tokens/s"


def _has_tensorflow() -> bool:
    try:
        import_tensorflow()
    except Exception:  # TensorFlow is absent or broken
        return False
    return True


def feed(order: TrainOrder, config: Config, backend: Backend, steps: int) -> float:
    """Returns tokens per second, including the padding of packed rows."""
    with contextlib.closing(train_stream(order, config, 0, share=Share(1), backend=backend)) as stream:
        for _ in range(2 * BLOCK):  # takes the batches that were made ahead
            next(stream)
        count, start = 0, time.perf_counter()
        while count < steps or time.perf_counter() - start < FEED_SECONDS:
            next(stream)
            count += 1
        return count * config.batch_size * config.seq_len / (time.perf_counter() - start)


def seek(order: TrainOrder, config: Config, backend: Backend) -> float:
    """Returns the milliseconds to the first batch of a run that resumes after FAR steps."""
    start = time.perf_counter()
    with contextlib.closing(train_stream(order, config, FAR, share=Share(1), backend=backend)) as stream:
        next(stream)
        return (time.perf_counter() - start) * 1e3


# Waiting


class Timed:
    """A stream of batches that measures the seconds spent on taking them."""

    def __init__(self, stream: TrainStream):
        self._stream = stream
        self.seconds = 0.0

    def __iter__(self) -> "Timed":
        return self

    def __next__(self) -> HostBatch:
        start = time.perf_counter()
        batch = next(self._stream)
        self.seconds += time.perf_counter() - start
        return batch


def measure_waiting(corpus: Corpus, config: Config, rounds: int, steps: int, compute_ms: float) -> dict[str, Any]:
    """Measures the training loop itself, with steps that train nothing.

    The loop takes a batch while the devices compute, so they wait for only a part of the share with a computation.
    """
    import numpy as np
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    from jaxlm.train.loop import train

    devices = runtime.choose_devices(config)
    sharding = NamedSharding(Mesh(np.array(devices), ("devices",)), PartitionSpec("devices"))
    kinds = {"sleep": lambda: time.sleep(compute_ms / 1e3), "computation": _computation(sharding, compute_ms / 1e3)}
    found: dict[str, list[tuple[float, float]]] = {kind: [] for kind in kinds}
    with contextlib.closing(
        train_stream(
            TrainOrder(corpus, config), config, 0, share=Share(len(devices), of_a_replica=config.parallel.of_a_replica)
        )
    ) as stream:
        for _ in range(PATIENCE + 1):
            next(stream)
        stream.settle()
        for _ in range(2 * BLOCK):  # the first of these starts the background work
            next(stream)
        for i in range(rounds):
            for kind in list(kinds)[:: 1 if i % 2 else -1]:
                batches, start = Timed(stream), time.perf_counter()
                train(
                    cast(Any, None),
                    lambda state, batch, kind=kind: (state, {"done": kinds[kind]()}),
                    batches,
                    start=0,
                    steps=steps,
                    sharding=sharding,
                    on_step=lambda done: None,
                    hooks=[],
                )
                seconds = time.perf_counter() - start
                found[kind].append((batches.seconds / seconds, seconds / steps * 1e3))
    result: dict[str, Any] = {"compute_ms": compute_ms, "devices": f"{len(devices)} x {devices[0].device_kind}"}
    for kind, numbers in found.items():
        result[f"{kind}_share"], result[f"{kind}_step_ms"] = map(statistics.median, zip(*numbers, strict=True))
    shown = [f"{kind} {result[f'{kind}_share']:.2%} (a step {result[f'{kind}_step_ms']:.1f} ms)" for kind in kinds]
    print(f"waiting · steps of {compute_ms:g} ms · {' · '.join(shown)}", flush=True)
    return result


def _computation(sharding: Any, seconds: float) -> Callable[[], Any]:
    """Returns a function that makes all devices compute for about `seconds`; its result is ready when they are done."""
    import jax
    import numpy as np

    size, times = 256, 50
    x = jax.device_put(np.full((len(sharding.device_set), size, size), 1 / size, np.float32), sharding)
    multiply = jax.jit(lambda x, times: jax.lax.fori_loop(0, times, lambda _, x: x @ x, x))

    def took() -> float:
        start = time.perf_counter()
        jax.block_until_ready(multiply(x, times))
        return time.perf_counter() - start

    took()  # compiles
    for _ in range(2):  # the second time at about the right length, so that the cost of the call hardly counts
        times = max(1, round(times * seconds / min(took() for _ in range(3))))
    return lambda: multiply(x, times)
