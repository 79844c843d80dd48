"""Two processes with two devices each, joined over TCP, are one run on four devices."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxlm.checkpoint import Checkpointer
from jaxlm.cli import load

ROOT = Path(__file__).parents[1]
CONFIG = ROOT / "configs/debug.py"
TINY = ["batch_size=8", "seq_len=16", "model.d_model=16", "model.scan_unroll=1", "model.dropout=0.1", "optim.name=muon",
        "optim.lr=0.003", "optim.schedule=constant", "optim.warmup_steps=1", "optim.accum_steps=2",
        "checkpoint.every_steps=20", "checkpoint.keep=50", "eval.every_steps=20", "eval.batches=3", "log.every_steps=5",
        "log.tensorboard=False"]  # fmt: skip
LIMIT = 150  # seconds, after which a run that hangs is killed


def flags(*overrides: str) -> list[str]:
    return [f"--config.{o}" for o in (*TINY, *overrides)]


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def start(workdir: Path, processes: int, *overrides: str) -> list[subprocess.Popen[str]]:
    """All processes of a run, with four devices together."""
    command = [
        sys.executable,
        "-m",
        "jaxlm.main",
        "--config",
        str(CONFIG),
        "--workdir",
        str(workdir),
        *flags(*overrides),
    ]
    address, devices = f"127.0.0.1:{free_port()}", 4 // processes
    started = []
    for i in range(processes):
        joined = ["--coordinator", address, "--num_processes", str(processes), "--process_id", str(i)]
        started.append(
            subprocess.Popen(
                command + (joined if processes > 1 else []), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                text=True, env=os.environ | {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"},
            )
        )  # fmt: skip
    return started


def finish(started: list[subprocess.Popen[str]]) -> list[tuple[int, str, str]]:
    """(exit code, stdout, stderr) of each; none outlives its time."""
    deadline = time.monotonic() + LIMIT
    try:
        outputs = [p.communicate(timeout=max(1, deadline - time.monotonic())) for p in started]
    finally:
        for p in started:
            p.kill()
    return [(p.returncode, *output) for p, output in zip(started, outputs, strict=True)]


def lines(workdir: Path) -> list[dict[str, Any]]:
    path = workdir / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().split("\n")[:-1]] if path.exists() else []


def numbers(workdir: Path) -> list[dict[str, Any]]:
    timing = {"tokens_per_second", "step_seconds", "mfu", "eval_bits_per_byte"}
    return [{k: v for k, v in m.items() if k not in timing} for m in lines(workdir)]


def params(workdir: Path, step: int) -> Any:
    checkpoints = Checkpointer(workdir, load(CONFIG, flags("steps=40")).checkpoint, read_only=True)
    found = checkpoints.restore_params(step)
    checkpoints.close()
    return found


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[tuple[int, str, str]]]:
    """A run of two processes that is never stopped."""
    workdir = tmp_path_factory.mktemp("two") / "run"
    return workdir, finish(start(workdir, 2, "steps=40"))


@pytest.mark.slow
def test_two_processes_are_one_run(two: tuple[Path, list[tuple[int, str, str]]], tmp_path: Path):
    workdir, results = two
    assert [code for code, *_ in results] == [0, 0], results
    assert "4 x cpu" in results[0][1] and "step" in results[0][1]
    # The second process says nothing; the lines that Gloo prints of its connections may run into each other.
    assert "cpu" not in results[1][1] and "step" not in results[1][1]
    assert [error for *_, error in results] == ["", ""]
    assert [code for code, *_ in finish(start(tmp_path / "run", 1, "steps=40"))] == [0]
    one = numbers(tmp_path / "run")
    # Only the first process writes: no line is there twice.
    assert [(m["step"], "loss" in m) for m in numbers(workdir)] == [(m["step"], "loss" in m) for m in one]
    for a, b in zip(numbers(workdir), one, strict=True):
        assert a == pytest.approx(b, rel=1e-5)
    assert one[0]["loss"] - one[-2]["loss"] > 0.01  # it learned, so the numbers say something

    def check(a: Any, b: Any) -> None:
        for key in b:
            if isinstance(b[key], dict):
                check(a[key], b[key])
            else:
                np.testing.assert_allclose(a[key], b[key], rtol=0, atol=1e-5 * np.abs(b[key]).max(), err_msg=key)

    for step in (0, 20, 40):
        check(params(workdir, step), params(tmp_path / "run", step))


@pytest.mark.slow
def test_sigterm_to_both_stops_both_and_they_go_on(two: tuple[Path, list[tuple[int, str, str]]], tmp_path: Path):
    """They stop after the same step, and go on with the numbers of the run that was never stopped, bit for bit."""
    workdir = tmp_path / "run"
    long = start(workdir, 2, "steps=100000", "checkpoint.every_steps=100000", "eval.every_steps=0")
    deadline = time.monotonic() + LIMIT
    try:
        while not any(m["step"] >= 5 for m in lines(workdir)):
            assert all(p.poll() is None for p in long) and time.monotonic() < deadline, finish(long)
            time.sleep(0.002)
        for p in long:
            p.send_signal(signal.SIGTERM)
    finally:
        results = finish(long)
    assert [code for code, *_ in results] == [75, 75], results
    stopped = max(int(p.name) for p in (workdir / "checkpoints").iterdir())
    assert f"stopped after step {stopped}," in results[0][1] and stopped % 10 == 0

    more = f"steps={stopped + 20}"
    again = finish(start(workdir, 2, more, "checkpoint.every_steps=100000", "eval.every_steps=0"))
    assert [code for code, *_ in again] == [0, 0], again
    assert f"goes on after step {stopped}" in again[0][1]
    steps = [m["step"] for m in lines(workdir) if "loss" in m]
    assert steps == [1, *range(5, stopped + 21, 5)]
    reference, found = ({m["step"]: m["loss"] for m in numbers(w) if "loss" in m} for w in (two[0], workdir))
    common = [step for step in found if step in reference]
    assert len(common) >= 3
    assert [found[s] for s in common] == [reference[s] for s in common]
    if stopped < 40:
        assert any(step > stopped for step in common)


@pytest.mark.slow
def test_weights_of_a_run_of_two_processes_are_taken_by_others(two: tuple[Path, Any], tmp_path: Path):
    """By two processes, and by one with as many devices; `params` above has other devices than the run had."""
    want = params(two[0], 40)
    for processes in (2, 1):
        workdir = tmp_path / f"run{processes}"
        results = finish(
            start(workdir, processes, "steps=1", f"checkpoint.resume={two[0]}", "checkpoint.every_steps=0")
        )
        assert [code for code, *_ in results] == [0] * processes, results
        assert "starts from the weights of step 40" in results[0][1]
        found = params(workdir, 0)
        np.testing.assert_array_equal(found["embed"]["embedding"], want["embed"]["embedding"])


@pytest.mark.slow
def test_a_mistake_ends_both_with_2(tmp_path: Path):
    results = finish(
        start(tmp_path / "run", 2, "steps=40", "batch_size=12", "optim.accum_steps=1", "parallel.devices=3")
    )
    assert [code for code, *_ in results] == [2, 2]
    assert all("parallel.devices" in error and "Traceback" not in error for *_, error in results)
    assert not (tmp_path / "run").exists()
