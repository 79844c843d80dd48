"""Stopping and going on leaves no trace; what may be changed in between, and what is refused."""

import json
import shutil
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from jaxlm import hooks
from jaxlm import run as runs
from jaxlm import step as steps
from jaxlm.checkpoint import Checkpoints
from jaxlm.cli import load
from jaxlm.config import UserError
from jaxlm.main import exit_code
from jaxlm.model import make_model
from jaxlm.placement import Placement
from jaxlm.signals import StopSignal
from jaxlm.stop import LEFT
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

# Stopping and going on


def test_sigterm_stops_with_75_and_the_same_command_goes_on_bit_for_bit(whole: Path, tmp_path: Path):
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


def test_kill_9_and_the_same_command_goes_on_bit_for_bit(whole: Path, tmp_path: Path):
    process = start(tmp_path / "run")
    wait_for_step(process, tmp_path / "run", CHECKPOINT + 10)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    reached = lines(tmp_path / "run")[-1]["step"]
    assert CHECKPOINT < reached < STEPS
    with open(tmp_path / "run/metrics.jsonl", "a") as file:
        file.write('{"step": 99')  # half a line, as when it is killed while it writes one
    assert run(tmp_path / "run") == 0
    assert numbers(tmp_path / "run") == numbers(whole)
    assert_identical(state_of(tmp_path / "run", STEPS), state_of(whole, STEPS))


def test_an_average_that_begins_later_is_in_float32(tmp_path: Path):
    """As one that was there from the start, also where parameters are not."""
    keys = {"steps": 1, "model.param_dtype": "bfloat16", "eval.every_steps": 0}
    assert run(tmp_path / "run", **keys | {"optim.ema_decay": 0}) == 0
    config = load(CONFIG, flags(**keys))
    placement = Placement(config, jax.devices()[:2])
    checkpoints = Checkpoints(tmp_path / "run")
    state = checkpoints.restore(1, placement, placement.initial(make_model(config.model, 64, config.seq_len)))
    checkpoints.close()
    assert [{str(x.dtype) for x in jax.tree.leaves(tree)} for tree in (state.params, state.ema)] == [
        {"bfloat16"},
        {"float32"},
    ]
    jax.tree.map(np.testing.assert_array_equal, state.ema, steps.float32(state.params))


class Ended(BaseException):
    """The process would be gone."""


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
def test_signal_while_it_compiles_or_evaluates(
    when: str,
    step: int,
    whole: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    """It is not waited for what takes long. An evaluation that is cut short is made first when the run goes on."""
    stop, end = InProcess(), threading.Event()
    places: dict[str, tuple[Any, str]] = {
        "compile": (steps, "make_train_step"), "sample": (hooks, "sample_text"),
        "cut sample": (hooks, "sample_text"), "at the end": (runs, "close"),
    }  # fmt: skip
    module, name = places.get(when, (steps, "make_eval_step"))
    make: Callable[..., Any] = getattr(module, name)

    def make_signalling(*args: Any) -> Any:
        inner = make(*args)

        def traced(*inputs: Any) -> Any:  # runs once, when it is compiled
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
                runs.run(config, tmp_path / "run", stop=stop)
        else:
            assert runs.run(config, tmp_path / "run", stop=stop) == runs.STOPPED
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
    scored = when == "at the end"  # the line of an evaluation has its sample
    assert numbers(tmp_path / "run") == [
        m for m in numbers(whole, step) if m["step"] < step or scored or "eval_loss" not in m
    ]
    assert run(tmp_path / "run", steps=step + 10 if step < STEPS else step) == 0
    assert numbers(tmp_path / "run")[: len(numbers(whole, step))] == numbers(whole, step)
    before = numbers(tmp_path / "run")
    assert run(tmp_path / "run", steps=before[-1]["step"]) == 0
    assert numbers(tmp_path / "run") == before  # it is finished


def test_an_error_in_the_loop_leaves_cleanly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    train_batches = runs.train_batches

    class Broken:
        """Real batches, of which the fourth cannot be read."""

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

    monkeypatch.setattr(runs, "train_batches", Broken)
    before = set(threading.enumerate())
    with pytest.raises(OSError, match="the disk is gone"):
        run(tmp_path / "run")
    left = [t for t in set(threading.enumerate()) - before if not t.daemon]
    for thread in left:
        thread.join(timeout=5)
    assert not [t for t in left if t.is_alive()]
    monkeypatch.undo()
    assert int(state_of(tmp_path / "run", 0).step) == 0  # what was under way is whole


def test_diverged_run_is_exit_code_3_and_leaves_no_checkpoint_of_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
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
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(params)), f"checkpoint {newest} cannot be gone on from"


# Going on with another configuration


def test_more_steps_go_on_as_if_they_had_been_planned(whole: Path, copy: Path):
    assert run(copy, steps=CHECKPOINT + 60) == 0
    upto = CHECKPOINT + 60
    assert [m for m in numbers(copy) if "loss" in m] == [m for m in numbers(whole, upto) if "loss" in m]
    # That of the end of the short run is there besides those of the long one's period.
    assert [m["step"] for m in lines(copy) if "eval_loss" in m] == [100, 150, 160]


def test_other_number_of_devices_goes_on_with_the_same_numbers(whole: Path, copy: Path):
    assert run(copy, parallel__devices=4, steps=CHECKPOINT + 30, optim__accum_steps=2) == 0
    got = [m for m in numbers(copy) if "loss" in m and m["step"] > CHECKPOINT]
    want = [m for m in numbers(whole, CHECKPOINT + 30) if "loss" in m and m["step"] > CHECKPOINT]
    assert len(got) == 3
    for a, b in zip(got, want, strict=True):
        assert a == pytest.approx(b, rel=1e-5)


def test_changed_keys_are_said_and_kept(copy: Path, capsys: pytest.CaptureFixture[str]):
    """What may change: steps, learning rate, loss, dropout."""
    keys = {"steps": CHECKPOINT + 1, "optim.lr": 0.001, "loss.label_smoothing": 0.1, "model.dropout": 0.0}
    assert run(copy, **keys) == 0
    said = [line for line in capsys.readouterr().out.splitlines() if "changed since the last run" in line]
    assert len(said) == 1
    saved = json.loads((copy / "config.json").read_text())
    for words in ("steps 100 -> 101", "optim.lr 0.003 -> 0.001", "model.dropout 0.1 -> 0.0"):
        assert words in said[0] and words in saved["history"][0]["changed"]
    assert len(saved["history"]) == 1 and saved["config"]["optim"]["lr"] == 0.001
    assert lines(copy)[-2]["lr"] == pytest.approx(0.001)


REFUSED = [("seed", 0, 1), ("batch_size", 8, 16), ("seq_len", 16, 8), ("model.d_model", 16, 32),
           ("data.vocab_size", 64, 32), ("optim.name", "adamw", "sgd")]  # fmt: skip


@pytest.mark.parametrize("key, old, new", REFUSED, ids=[key for key, *_ in REFUSED])
def test_what_would_change_the_past_is_refused(short: Path, key: str, old: Any, new: Any):
    before = contents(short)
    with pytest.raises(UserError) as refusal:
        run(short, **{"steps": CHECKPOINT, key: new})
    assert key in str(refusal.value) and repr(old) in str(refusal.value) and repr(new) in str(refusal.value)
    assert contents(short) == before


def contents(folder: Path) -> dict[Path, bytes]:
    return {p: p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.mark.parametrize(
    "keys, words",
    [
        ({"steps": CHECKPOINT - 1}, ["steps", "99", "100"]),
        ({"steps": CHECKPOINT, "checkpoint.resume": "never"}, ["checkpoint.resume", "never"]),
        ({"steps": CHECKPOINT, "parallel.devices": 3}, ["batch_size", "8", "3"]),
        ({"steps": CHECKPOINT, "parallel.devices": 16}, ["parallel.devices", "16", "8"]),
    ],
)
def test_refusals_write_nothing(short: Path, keys: dict[str, Any], words: list[str]):
    before = contents(short)
    with pytest.raises(UserError) as refusal:
        run(short, **keys)
    assert all(word in str(refusal.value) for word in words)
    assert contents(short) == before


def test_finished_run_is_scored_again_and_nothing_is_written_twice(short: Path):
    before = lines(short)
    assert run(short, steps=CHECKPOINT) == 0
    assert lines(short) == before


def test_resume_takes_weights_into_a_new_run(short: Path, tmp_path: Path):
    keys = {"seed": 7, "steps": 1, "checkpoint.resume": short}
    assert run(tmp_path / "run", **keys) == 0
    there, here = state_of(short, CHECKPOINT), state_of(tmp_path / "run", 0)
    assert_identical(here.params, there.ema)  # what the other run is judged by
    assert_identical(here.ema, here.params)
    assert int(here.step) == 0 and all(not x.any() for x in jax.tree.leaves(here.opt_state))
    # From step 1 on the run's own checkpoints count, with the same command.
    assert run(tmp_path / "run", **(keys | {"steps": 2})) == 0
    assert [m["step"] for m in lines(tmp_path / "run") if "loss" in m] == [1, 2]


@pytest.mark.parametrize("resume, d_model", [("no/such/run", 16), ("SHORT", 32)])
def test_weights_that_do_not_fit_are_refused_and_nothing_is_written(
    resume: str, d_model: int, short: Path, tmp_path: Path
):
    with pytest.raises(UserError, match=r"checkpoint\.resume"):
        run(tmp_path / "run", **{"checkpoint.resume": resume.replace("SHORT", str(short)), "model.d_model": d_model})
    assert not (tmp_path / "run").exists()


def test_a_run_killed_before_its_first_save_is_no_run_yet(tmp_path: Path):
    assert run(tmp_path / "run", steps=1) == 0
    shutil.rmtree(tmp_path / "run/checkpoints")
    (tmp_path / "run/checkpoints").mkdir()
    assert run(tmp_path / "run", steps=1, seed=5) == 0  # another seed contradicts nothing
    assert lines(tmp_path / "run")[0]["step"] == 1


def test_never_starts_a_new_run(tmp_path: Path):
    assert run(tmp_path / "run", steps=1, checkpoint__resume="never") == 0
    assert lines(tmp_path / "run")[0]["step"] == 1


def test_goes_on_with_other_devices_and_other_ways_to_exchange(tmp_path: Path):
    """8, 3, 1, then 4 devices, ZeRO on and off, other accumulation: the losses are those of a run that changed nothing;
    what was changed is said.
    """
    keys = {"log.every_steps": 1, "batch_size": 24, "eval.every_steps": 0}
    assert run(tmp_path / "plain", steps=4, **keys) == 0
    changes = [
        {"steps": 1, "parallel.zero": 1, "parallel.reduce": "ring", "parallel.devices": 8},
        {"steps": 2, "parallel.overlap": True, "parallel.bucket_mb": 0.001, "parallel.devices": 3},
        {"steps": 3, "parallel.zero": 1, "parallel.devices": 1, "optim.accum_steps": 4},
        {"steps": 4, "parallel.devices": 4},
    ]
    for change in changes:
        assert run(tmp_path / "changed", **keys, **change) == 0
    want, got = ([m["loss"] for m in lines(tmp_path / name) if "loss" in m] for name in ("plain", "changed"))
    assert got == pytest.approx(want, rel=1e-5) and len(got) == 4 and want[0] != want[3]
    history = [h["changed"] for h in json.loads((tmp_path / "changed/config.json").read_text())["history"]]
    assert ["parallel.zero 1 -> 0" in h for h in history] == [True, False, True]
    assert all("parallel.devices" in h for h in history)


def test_a_lossy_exchange_may_be_given_up(tmp_path: Path):
    """The next loss is that of the same parameters, whoever computes it."""
    keys = {"log.every_steps": 1, "eval.every_steps": 0, "checkpoint.every_steps": 2}
    assert run(tmp_path / "int8", steps=3, **keys | {"parallel.reduce": "int8"}) == 0
    shutil.copytree(tmp_path / "int8", tmp_path / "pmean")
    shutil.rmtree(tmp_path / "pmean/checkpoints/3")
    assert run(tmp_path / "pmean", steps=3, **keys) == 0
    int8, pmean = ([m["loss"] for m in lines(tmp_path / name) if "loss" in m] for name in ("int8", "pmean"))
    assert pmean == pytest.approx(int8, rel=1e-5) and len(pmean) == 3
