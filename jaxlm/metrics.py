"""Where the numbers of a run go: metrics.jsonl, TensorBoard, Weights & Biases; and what a device could do at most."""

import errno
import importlib
import io
import json
import math
import os
import re
import secrets
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from jaxlm import checksums
from jaxlm.config import Config, flatten
from jaxlm.retry import Pause, insist
from jaxlm.workdir import write_whole

Metrics = dict[str, Any]
Writer = Callable[[Metrics], None]  # each is given {'step': N, ...}

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
    """Sends metrics to writers. What one cannot write now, for a full disk or a network's, it is given again later, in
    the same order; that is said, and training goes on.
    """

    def __init__(self, writers: list[Writer], say: Callable[[str], None]):
        self._queues: list[tuple[Writer, list[Metrics]]] = [(writer, []) for writer in writers]
        self._say, self._pause, self._lock = say, Pause(), threading.Lock()

    def __call__(self, metrics: Metrics) -> None:
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
        """Returns when all lines of metrics.jsonl are on disk: before a checkpoint, since what lies before one is never
        written again. Raises OSError where they cannot be.
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
        _append(self._path, (json.dumps(known) + "\n").encode())

    def sync(self) -> None:
        if self._path.exists():
            checksums.sync(self._path)
            checksums.sync(self._path.parent)


def _append(path: Path, content: bytes) -> None:
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


def validation_losses(workdir: Path) -> dict[int, float]:
    """{step: loss} of the evaluations so far."""
    found, path = {}, workdir / "metrics.jsonl"
    for line in path.read_text().splitlines() if path.exists() else []:
        with suppress(ValueError, KeyError, TypeError):  # half a line, or one of training
            m = json.loads(line)
            found[int(m["step"])] = float(m["eval_loss"])
    return found


def tensorboard(folder: Path, resume_step: int) -> Writer:
    """Event files in `folder`; TensorBoard hides what an earlier run wrote after the step that this one starts from."""
    # Its messages and records alone: TensorBoard's own EventFileWriter imports TensorFlow. The messages' classes are
    # made when they are imported, where no type checker sees them.
    from tensorboard.compat.proto import event_pb2, summary_pb2
    from tensorboard.summary.writer.record_writer import RecordWriter

    events: Any = event_pb2
    summaries: Any = summary_pb2
    Event, SessionLog, Summary = events.Event, events.SessionLog, summaries.Summary

    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"events.out.tfevents.{time.time():.0f}.{socket.gethostname()}.{os.getpid()}"

    def add(**fields: Any) -> None:
        record = io.BytesIO()
        RecordWriter(record).write(Event(wall_time=time.time(), **fields).SerializeToString())
        _append(path, record.getvalue())

    add(file_version="brain.Event:2")
    if resume_step:
        add(step=resume_step + 1, session_log=SessionLog(status=SessionLog.START))

    def write(metrics: Metrics) -> None:
        numbers = {k: v for k, v in metrics.items() if k != "step" and isinstance(v, (int, float))}
        group = "eval" if "eval_loss" in metrics else "train"
        values = [Summary.Value(tag=f"{group}/{k.removeprefix('eval_')}", simple_value=v) for k, v in numbers.items()]
        add(step=metrics["step"], summary=Summary(value=values))

    return write


def wandb_writer(config: Config, workdir: Path) -> Writer:
    """Weights & Biases; the id is kept in the workdir, so that a resumed run goes on in the same chart."""
    wandb = importlib.import_module("wandb")  # optional, so no type checker sees it

    id_file = workdir / "wandb_id"
    if not id_file.exists():
        id_file.write_text(secrets.token_hex(8))
    run = wandb.init(
        project=os.environ.get("WANDB_PROJECT", "jaxlm"), name=workdir.name, id=id_file.read_text(), resume="allow",
        dir=workdir, config=flatten(config),
    )  # fmt: skip
    return lambda metrics: run.log({k: v for k, v in metrics.items() if k != "step"}, step=metrics["step"])
