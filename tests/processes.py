"""Runs a tiny model with several processes on this machine, joined over TCP."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.runs import CONFIG, ROOT, lines, xla_flags

TINY = [
    "batch_size=8",
    "seq_len=16",
    "model.d_model=16",
    "model.scan_unroll=1",
    "model.dropout=0.1",
    "optim.name=muon",
    "model.matmul_precision=highest",  # the same up to rounding on any number of devices
    "optim.lr=0.003",
    "optim.schedule=constant",
    "optim.warmup_steps=1",
    "optim.accum_steps=2",
    "checkpoint.every_steps=20",
    "checkpoint.keep=50",
    "eval.every_steps=20",
    "eval.batches=3",
    "log.every_steps=5",
    "log.tensorboard=False",
]
LIMIT = 150  # seconds after which a hanging run is killed


def flags(*overrides: str) -> list[str]:
    return [f"--config.{o}" for o in (*TINY, *overrides)]


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def start(
    workdir: Path,
    processes: int,
    *overrides: str,
    more: dict[int, list[str]] | None = None,
    devices: Any = None,
    program: Sequence[str] = ("-m", "jaxlm.main"),
) -> list[subprocess.Popen[str]]:
    """Starts all processes of a run, by default with four devices in total.

    Args:
      more: further arguments of some processes, by their index.
      devices: the number of devices of each process.
    """
    command = [sys.executable, *program, "--config", str(CONFIG), "--workdir", str(workdir), *flags(*overrides)]
    address, devices = f"127.0.0.1:{free_port()}", devices or [4 // processes] * processes
    started = []
    for i in range(processes):
        joined = ["--coordinator", address, "--num_processes", str(processes), "--process_id", str(i)]
        arguments = command + (more or {}).get(i, []) + (joined if processes > 1 else [])
        env = os.environ | {"XLA_FLAGS": xla_flags(devices[i])}
        started.append(
            subprocess.Popen(arguments, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)
        )
    return started


def finish(started: list[subprocess.Popen[str]]) -> list[tuple[int, str, str]]:
    """Returns (exit code, stdout, stderr) of each process. Kills the processes after LIMIT."""
    deadline = time.monotonic() + LIMIT
    try:
        outputs = [p.communicate(timeout=max(1, deadline - time.monotonic())) for p in started]
    finally:
        for p in started:
            p.kill()
    return [(p.returncode, *output) for p, output in zip(started, outputs, strict=True)]


def numbers(workdir: Path) -> list[dict[str, Any]]:
    """Returns the metrics without times, and without bits per byte."""
    timing = {"time", "tokens_per_second", "step_seconds", "mfu", "peak_memory_bytes", "eval_bits_per_byte"}
    return [{k: v for k, v in m.items() if k not in timing} for m in lines(workdir)]
