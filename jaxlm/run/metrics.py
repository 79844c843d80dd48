"""Sends metrics to their writers: metrics.jsonl, and those of charts.py. Also knows the peak FLOP/s of devices."""

import re
import threading
import time
from collections.abc import Callable

from jaxlm.checkpoint.metrics_file import JsonLines, Metrics
from jaxlm.host.retry import Pause, insist

Writer = Callable[[Metrics], None]  # called with {'step': N, ..., 'time': seconds since the epoch}

# Dense 16-bit FLOP/s of one device, from the makers' data sheets. Keys are whole words of JAX's device_kind; the first
# match counts, so longer names come first.
PEAK_FLOPS = {
    "GB200": 2500e12,
    "B200": 2250e12,
    "GH200": 989e12,
    "H200": 989e12,
    "H100 NVL": 835e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "A10G": 70e12,
    "L40S": 362e12,
    "L40": 181e12,
    "L4": 121e12,
    "V100": 125e12,
    "T4": 65e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
    "RTX A6000": 155e12,
}


def peak_flops(device_kind: str) -> float | None:
    """Returns the FLOP/s of the 16-bit matrix units; None if unknown (all CPUs)."""
    return next((flops for name, flops in PEAK_FLOPS.items() if re.search(rf"\b{name}\b", device_kind)), None)


class Log:
    """Sends metrics to writers. If one cannot write (a full disk, a lost network), a line says so, training continues,
    and the writer gets the same metrics again later, in order.
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
            except OSError as error:  # the other writers do not wait
                errors.append(error)
        if errors:
            raise errors[0]
        self._pause.end()

    def sync(self) -> None:
        """Returns when all lines of metrics.jsonl are on disk. Call it before writing a checkpoint: a resumed run never
        writes the lines before its checkpoint again. Raises OSError if they cannot be written.
        """
        with self._lock:
            for writer, queue in self._queues:
                if isinstance(writer, JsonLines):
                    _drain(writer, queue)
                    writer.sync()

    def finish(self) -> None:
        """Writes what is left, with retries. Raises OSError if that fails."""

        def act() -> None:
            self.sync()
            with self._lock:
                self._write()

        insist(act)


def _drain(writer: Writer, queue: list[Metrics]) -> None:
    while queue:
        writer(queue[0])
        queue.pop(0)
