"""A run that is stopped and resumed gives the results of a run that is never stopped."""

import shutil
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from jaxlm.checkpoint.reading import Checkpoints
from jaxlm.config.files import load
from jaxlm.host.exit_codes import exit_code
from jaxlm.host.signals import StopSignal
from jaxlm.host.stop import LEFT
from jaxlm.model import make_model
from jaxlm.run import evaluation, training
from jaxlm.run.setup import Setup
from jaxlm.train import step as train_step
from jaxlm.train.placement import Placement
from tests.runs import (
    CHECKPOINT,
    CONFIG,
    STEPS,
    assert_identical,
    flags,
    lines,
    numbers,
    run,
    start,
    state_of,
    wait_for_step,
)


def test_sigterm_stops_with_75_and_the_same_command_resumes_bit_for_bit(whole: Path, tmp_path: Path):
    process = start(tmp_path / "run")
    wait_for_step(process, tmp_path / "run", CHECKPOINT + 10)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 75, err
    assert "stopped after step" in out and err == ""
    stopped = max(int(p.name) for p in (tmp_path / "run/checkpoints").iterdir())
    assert CHECKPOINT < stopped < STEPS and f"stopped after step {stopped}," in out
    assert run(tmp_path / "run") == 0
    assert numbers(tmp_path / "run") == numbers(whole)
    assert_identical(state_of(tmp_path / "run", STEPS), state_of(whole, STEPS))


def test_after_kill_9_the_same_command_resumes_bit_for_bit(whole: Path, tmp_path: Path):
    process = start(tmp_path / "run")
    wait_for_step(process, tmp_path / "run", CHECKPOINT + 10)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    reached = lines(tmp_path / "run")[-1]["step"]
    assert CHECKPOINT < reached < STEPS
    with open(tmp_path / "run/metrics.jsonl", "a") as file:
        file.write('{"step": 99')  # half a line, as if killed while writing it
    assert run(tmp_path / "run") == 0
    assert numbers(tmp_path / "run") == numbers(whole)
    assert_identical(state_of(tmp_path / "run", STEPS), state_of(whole, STEPS))


def test_a_moving_average_that_starts_later_is_in_float32(tmp_path: Path):
    """Like one that exists from the start, even if the parameters are in bfloat16."""
    keys = {"steps": 1, "model.param_dtype": "bfloat16", "eval.every_steps": 0}
    assert run(tmp_path / "run", **keys | {"optim.ema_decay": 0}) == 0
    config = load(CONFIG, flags(**keys))
    placement = Placement(config, make_model(config.model, 64, config.seq_len), jax.devices()[:2])
    checkpoints = Checkpoints(tmp_path / "run")
    state = checkpoints.restore(1, placement, placement.initial())
    checkpoints.close()
    assert [{str(x.dtype) for x in jax.tree.leaves(tree)} for tree in (state.params, state.ema)] == [
        {"bfloat16"},
        {"float32"},
    ]
    jax.tree.map(np.testing.assert_array_equal, state.ema, train_step.float32(state.params))


class Ended(BaseException):
    """Stands for the end of the process."""


class InProcess(StopSignal):
    def end(self, line: str) -> None:
        raise Ended(line)


@pytest.mark.parametrize(
    "when, step",
    [
        ("compile", 0),
        ("evaluation", 150),
        ("sample", 150),
        ("cut sample", 150),
        ("last evaluation", STEPS),
        ("at the end", STEPS),
    ],
)
def test_a_signal_while_a_run_compiles_or_evaluates(
    when: str,
    step: int,
    whole: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    """The run does not wait for long work. When it resumes, it first repeats the evaluation that was cut short."""
    stop, end = InProcess(), threading.Event()
    places: dict[str, tuple[Any, str]] = {
        "compile": (train_step, "make_train_step"),
        "sample": (evaluation, "sample_text"),
        "cut sample": (evaluation, "sample_text"),
        "at the end": (training, "close"),
    }
    module, name = places.get(when, (train_step, "make_eval_step"))
    make: Callable[..., Any] = getattr(module, name)

    def make_signalling(*args: Any) -> Any:
        inner = make(*args)

        def traced(*inputs: Any) -> Any:  # runs once, at compilation
            asked()
            return inner(*inputs)

        return traced

    def asked(*args: Any) -> str | None:
        stop.receive()
        if when == "cut sample":
            return "it ends at once"
        end.wait(60)  # XLA is busy

    if when == "last evaluation":
        shutil.copytree(whole, tmp_path / "run")
        shutil.rmtree(tmp_path / "run/checkpoints" / str(STEPS))
    with monkeypatch.context() as patch:
        patch.setattr(module, name, asked if when in ("sample", "cut sample", "at the end") else make_signalling)
        keys = {"eval__every_steps": 0} if when == "last evaluation" else {}
        config = load(CONFIG, flags(**keys))
        if when in ("compile", "at the end"):
            with pytest.raises(Ended, match="before the first step" if when == "compile" else "after the last step"):
                training.run(config, tmp_path / "run", stop=stop)
        else:
            assert training.run(config, tmp_path / "run", stop=stop) == training.STOPPED
            assert f"stopped after step {step}, saved" in capsys.readouterr().out
    end.set()
    for thread in threading.enumerate():
        if thread.name == LEFT:
            thread.join()
    assert int(state_of(tmp_path / "run", step).step) == step
    if when == "compile":
        assert not numbers(tmp_path / "run")
        assert run(tmp_path / "run", steps=CHECKPOINT) == 0
        assert_identical(state_of(tmp_path / "run", CHECKPOINT), state_of(whole, CHECKPOINT))
        return
    scored = when == "at the end"  # otherwise its line is missing, because it would include the sample
    assert numbers(tmp_path / "run") == [
        m for m in numbers(whole, step) if m["step"] < step or scored or "eval_loss" not in m
    ]
    assert run(tmp_path / "run", steps=step + 10 if step < STEPS else step) == 0
    assert numbers(tmp_path / "run")[: len(numbers(whole, step))] == numbers(whole, step)
    before = numbers(tmp_path / "run")
    assert run(tmp_path / "run", steps=before[-1]["step"]) == 0
    assert numbers(tmp_path / "run") == before  # a finished run writes nothing


def test_an_error_in_the_loop_leaves_cleanly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    train_batches = Setup.train_batches

    class Broken:
        """The real batches, but the fourth cannot be read."""

        def __init__(self, *args: Any):
            self.inner, self.left = train_batches(*args), 4

        def __iter__(self) -> Any:
            return self

        def __next__(self) -> Any:
            self.left -= 1
            if not self.left:
                raise OSError("the disk is gone")
            return next(self.inner)

        def close(self) -> None:
            self.inner.close()

    monkeypatch.setattr(Setup, "train_batches", lambda *args: Broken(*args))
    before = set(threading.enumerate())
    with pytest.raises(OSError, match="the disk is gone"):
        run(tmp_path / "run")
    left = [t for t in set(threading.enumerate()) - before if not t.daemon]
    for thread in left:
        thread.join(timeout=5)
    assert not [t for t in left if t.is_alive()]
    monkeypatch.undo()
    assert int(state_of(tmp_path / "run", 0).step) == 0  # the save under way was completed


def test_a_diverged_run_is_exit_code_3_and_its_newest_checkpoint_is_finite(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    keys = {
        "optim.name": "sgd",
        "optim.lr": 1e30,
        "optim.clip_norm": 0,
        "checkpoint.every_steps": 1,
        "eval.every_steps": 0,
    }
    assert exit_code(lambda: run(tmp_path / "run", **keys)) == 3
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "diverged" in error
    newest = max(int(p.name) for p in (tmp_path / "run/checkpoints").iterdir())
    checkpoints = Checkpoints(tmp_path / "run")
    params = checkpoints.restore_params(newest, ema=False)
    checkpoints.close()
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(params)), (
        f"checkpoint {newest} has values that are not finite"
    )
