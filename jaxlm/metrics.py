"""Where the numbers of a run go: metrics.jsonl, TensorBoard, Weights & Biases; and what a device could do at most."""

import importlib
import json
import os
import re
import secrets
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jaxlm.config import Config, flatten
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


class JsonLines:
    """Appends one object a line to metrics.jsonl; what a resumed run is going to repeat is dropped first."""

    def __init__(self, path: Path, resume_step: int):
        if path.exists():
            kept = [line for line in path.read_text().splitlines(keepends=True) if _step_of(line) <= resume_step]
            write_whole(path, "".join(kept))
        self._path = path

    def __call__(self, metrics: Metrics) -> None:
        with open(self._path, "a") as file:
            file.write(json.dumps(metrics) + "\n")


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return float("inf")  # a line that a killed run did not finish


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
        with open(path, "ab") as file:
            RecordWriter(file).write(Event(wall_time=time.time(), **fields).SerializeToString())

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
