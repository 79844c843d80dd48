"""Where the numbers of a run go: metrics.jsonl here, charts.py for the rest; and what a device could do at most."""

import errno
import json
import math
import os
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from jaxlm import checksums
from jaxlm.retry import Pause, insist
from jaxlm.workdir import write_whole

Metrics = dict[str, Any]
Writer = Callable[[Metrics], None]  # each is given {'step': N, ..., 'time': seconds since the epoch}

# Dense 16-bit FLOP/s of one device, from the makers' data sheets; the key is whole words of JAX's device_kind.
# What says more comes first.
PEAK_FLOPS = {
    "GB200": 2500e12, "B200": 2250e12, "GH200": 989e12, "H200": 989e12, "H100 NVL": 835e12, "H100 PCIe": 756e12,
    "H100": 989e12, "A100": 312e12, "A10G": 70e12, "L40S": 362e12, "L40": 181e12, "L4": 121e12, "V100": 125e12,
    "T4": 65e12, "RTX 4090": 165e12, "RTX 3090": 71e12, "RTX A6000": 155e12,
}  # fmt: skip


def peak_flops(device_kind: str) -> float | None:
    """FLOP/s of the 16-bit matrix units; None where it is not known (all CPUs)."""
    return next((flops for name, flops in PEAK_FLOPS.items() if re.search(rf"\b{name}\b", device_kind)), None)


class Log:
    """Sends metrics to writers. If one cannot write now (a full disk, a network that is away), a line says so, training
    goes on, and the writer gets the same metrics again later, in order.
    """

    def __init__(self, writers: list[Writer], say: Callable[[str], None]):
        self._queues: list[tuple[Writer, list[Metrics]]] = [(writer, []) for writer in writers]
        self._say, self._pause, self._lock = say, Pause(), threading.Lock()

    def __call__(self, metrics: Metrics) -> None:
        metrics = metrics | {"time": round(time.time(), 3)}
        with self._lock:
            for _, queue in self._queues:
                queue.append(metrics)
            if self._pause.over:
                try:
                    self._write()
                except OSError as error:
                    self._say(f"metrics are NOT written: {error}; the next try is in {self._pause.begin():.0f} s")

    def _write(self) -> None:
        errors = []
        for writer, queue in self._queues:
            try:
                _drain(writer, queue)
            except OSError as error:  # the others do not wait for it
                errors.append(error)
        if errors:
            raise errors[0]
        self._pause.end()

    def sync(self) -> None:
        """Returns when all lines of metrics.jsonl are on disk. Call it before a checkpoint: lines before one are never
        written again. Raises OSError if they cannot be written.
        """
        with self._lock:
            for writer, queue in self._queues:
                if isinstance(writer, JsonLines):
                    _drain(writer, queue)
                    writer.sync()

    def finish(self) -> None:
        """Writes what is left, trying for a while. Raises OSError where it cannot be."""

        def act() -> None:
            self.sync()
            with self._lock:
                self._write()

        insist(act)


def _drain(writer: Writer, queue: list[Metrics]) -> None:
    while queue:
        writer(queue[0])
        queue.pop(0)


class JsonLines:
    """Appends one object a line to metrics.jsonl; what a resumed run is going to repeat is dropped first."""

    def __init__(self, path: Path, resume_step: int):
        if path.exists():
            kept = [line for line in path.read_text().splitlines(keepends=True) if _step_of(line) <= resume_step]
            write_whole(path, "".join(kept))
        self._path = path

    def __call__(self, metrics: Metrics) -> None:
        known = {k: v if not isinstance(v, float) or math.isfinite(v) else None for k, v in metrics.items()}
        append(self._path, (json.dumps(known) + "\n").encode())

    def sync(self) -> None:
        if self._path.exists():
            checksums.sync(self._path)
            checksums.sync(self._path.parent)


def append(path: Path, content: bytes) -> None:
    """Adds all of it to a file, or nothing."""
    with open(path, "ab", buffering=0) as file:
        start = file.tell()
        try:
            if file.write(content) < len(content):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        except OSError:
            file.truncate(start)
            raise


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return float("inf")  # a line that a killed run did not finish


def _objects(workdir: Path) -> Iterator[Metrics]:
    """The lines of metrics.jsonl that are JSON objects."""
    path = workdir / "metrics.jsonl"
    for line in path.read_text("utf-8", errors="replace").splitlines() if path.is_file() else []:
        with suppress(ValueError, RecursionError):  # half a line
            if isinstance(found := json.loads(line), dict):
                yield found


def evaluations(workdir: Path) -> dict[int, Metrics]:
    """{step: its line in metrics.jsonl} of the evaluations so far, without those that lack a score."""
    found = {}
    for m in _objects(workdir):
        with suppress(ValueError, KeyError, TypeError, OverflowError):  # of training, or changed by somebody
            bits, sample = m["eval_bits_per_byte"], m.get("sample")
            if isinstance(sample, str | None) and isinstance(bits, int | float | None):
                # JSON has no infinity, for which `JsonLines` writes null.
                perplexity = math.inf if m["eval_perplexity"] is None else float(m["eval_perplexity"])
                numbers = {k: float(m[k]) for k in ("eval_loss", "eval_accuracy")}
                found[int(m["step"])] = m | numbers | {"eval_perplexity": perplexity}
    return found


def validation_losses(workdir: Path) -> dict[int, float]:
    """{step: loss} of the evaluations so far."""
    found = {}
    for m in _objects(workdir):
        with suppress(ValueError, KeyError, TypeError, OverflowError):
            found[int(m["step"])] = float(m["eval_loss"])
    return found
