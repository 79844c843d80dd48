"""Resuming with another configuration: which changes are accepted, and which are refused."""

import json
import shutil
from pathlib import Path
from typing import Any

import jax
import pytest

from jaxlm.config import UserError
from tests.runs import (
    CHECKPOINT,
    assert_identical,
    lines,
    numbers,
    run,
    state_of,
)


def test_more_steps_continue_as_if_planned_from_the_start(whole: Path, copy: Path):
    assert run(copy, steps=CHECKPOINT + 60) == 0
    upto = CHECKPOINT + 60
    assert [m for m in numbers(copy) if "loss" in m] == [m for m in numbers(whole, upto) if "loss" in m]
    # There is one evaluation more, from the end of the short run.
    assert [m["step"] for m in lines(copy) if "eval_loss" in m] == [100, 150, 160]


GRID = {"parallel.tensor": 2, "parallel.pipeline": 2, "parallel.context": 2, "parallel.zero": 1}


@pytest.mark.parametrize("devices, grid", [(4, {}), (8, GRID)])
def test_other_devices_continue_with_the_same_numbers(devices: int, grid: dict[str, int], whole: Path, copy: Path):
    keys = {"parallel.devices": devices, "steps": CHECKPOINT + 30, "optim.accum_steps": 2}
    assert run(copy, **keys, **grid) == 0
    got = [m for m in numbers(copy) if "loss" in m and m["step"] > CHECKPOINT]
    want = [m for m in numbers(whole, CHECKPOINT + 30) if "loss" in m and m["step"] > CHECKPOINT]
    assert len(got) == 3
    for a, b in zip(got, want, strict=True):
        assert a == pytest.approx(b, rel=1e-5)


def test_changed_keys_are_printed_and_saved(copy: Path, capsys: pytest.CaptureFixture[str]):
    """Steps, learning rate, loss and dropout may change."""
    keys = {"steps": CHECKPOINT + 1, "optim.lr": 0.001, "loss.label_smoothing": 0.1, "model.dropout": 0.0}
    assert run(copy, **keys) == 0
    said = [line for line in capsys.readouterr().out.splitlines() if "changed since the last run" in line]
    assert len(said) == 1
    saved = json.loads((copy / "config.json").read_text())
    for words in ("steps 100 -> 101", "optim.lr 0.003 -> 0.001", "model.dropout 0.1 -> 0.0"):
        assert words in said[0] and words in saved["history"][0]["changed"]
    assert len(saved["history"]) == 1 and saved["config"]["optim"]["lr"] == 0.001
    assert lines(copy)[-2]["lr"] == pytest.approx(0.001)


REFUSED = [
    ("seed", 0, 1),
    ("batch_size", 8, 16),
    ("seq_len", 16, 8),
    ("model.d_model", 16, 32),
    ("data.vocab_size", 64, 32),
    ("optim.name", "adamw", "sgd"),
]


@pytest.mark.parametrize("key, old, new", REFUSED, ids=[key for key, *_ in REFUSED])
def test_changes_of_what_earlier_steps_depend_on_are_refused(short: Path, key: str, old: Any, new: Any):
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
    keys = {"seed": 7, "steps": 1, "checkpoint.resume": short, "parallel.zero": 3}
    assert run(tmp_path / "run", **keys) == 0
    there, here = state_of(short, CHECKPOINT), state_of(tmp_path / "run", 0)
    assert_identical(here.params, there.ema)  # the weights that the other run evaluates
    assert_identical(here.ema, here.params)
    assert int(here.step) == 0 and all(not x.any() for x in jax.tree.leaves(here.opt_state))
    # From step 1 on, the same command resumes from the run's own checkpoints.
    assert run(tmp_path / "run", **(keys | {"steps": 2})) == 0
    assert [m["step"] for m in lines(tmp_path / "run") if "loss" in m] == [1, 2]


@pytest.mark.parametrize("resume, d_model", [("no/such/run", 16), ("SHORT", 32)])
def test_weights_that_do_not_fit_are_refused_and_nothing_is_written(
    resume: str, d_model: int, short: Path, tmp_path: Path
):
    with pytest.raises(UserError, match=r"checkpoint\.resume"):
        run(tmp_path / "run", **{"checkpoint.resume": resume.replace("SHORT", str(short)), "model.d_model": d_model})
    assert not (tmp_path / "run").exists()


def test_a_run_killed_before_its_first_save_may_start_with_other_keys(tmp_path: Path):
    assert run(tmp_path / "run", steps=1) == 0
    shutil.rmtree(tmp_path / "run/checkpoints")
    (tmp_path / "run/checkpoints").mkdir()
    assert run(tmp_path / "run", steps=1, seed=5) == 0  # another seed is accepted, because there is no checkpoint
    assert lines(tmp_path / "run")[0]["step"] == 1


def test_with_resume_never_a_new_run_starts(tmp_path: Path):
    assert run(tmp_path / "run", steps=1, checkpoint__resume="never") == 0
    assert lines(tmp_path / "run")[0]["step"] == 1


@pytest.mark.ci
def test_a_run_continues_with_other_devices_and_reductions(tmp_path: Path):
    """With 8, 3, 1, then 4 devices, ZeRO on and off, and other accumulation, the losses are those of an unchanged run.
    The changes are recorded.
    """
    keys = {"log.every_steps": 1, "batch_size": 24, "eval.every_steps": 0}
    assert run(tmp_path / "plain", steps=4, **keys) == 0
    changes = [
        {"steps": 1, "parallel.zero": 3, "parallel.reduce": "ring", "parallel.devices": 8},
        {"steps": 2, "parallel.overlap": True, "parallel.bucket_mb": 0.001, "parallel.devices": 3},
        {"steps": 3, "parallel.zero": 1, "parallel.devices": 1, "optim.accum_steps": 4},
        {"steps": 4, "parallel.devices": 4},
    ]
    for change in changes:
        assert run(tmp_path / "changed", **keys, **change) == 0
    want, got = ([m["loss"] for m in lines(tmp_path / name) if "loss" in m] for name in ("plain", "changed"))
    assert got == pytest.approx(want, rel=1e-5) and len(got) == 4 and want[0] != want[3]
    history = [h["changed"] for h in json.loads((tmp_path / "changed/config.json").read_text())["history"]]
    zeros = ["parallel.zero 3 -> 0", "parallel.zero 0 -> 1", "parallel.zero 1 -> 0"]
    assert [words in h for words, h in zip(zeros, history, strict=True)] == [True] * 3
    assert all("parallel.devices" in h for h in history)


def test_a_stopped_run_with_parameters_in_parts_continues_bit_for_bit(tmp_path: Path):
    keys = {"parallel.zero": 3, "parallel.devices": 4, "log.every_steps": 1, "checkpoint.every_steps": 4}
    for name, ends in (("whole", [8]), ("stopped", [4, 8])):
        for steps in ends:
            assert run(tmp_path / name, steps=steps, **keys) == 0
    whole, stopped = (state_of(tmp_path / name, 8, **keys) for name in ("whole", "stopped"))
    assert_identical(whole, stopped)
    got, want = ([m["loss"] for m in lines(tmp_path / name) if "loss" in m] for name in ("stopped", "whole"))
    assert got == want and len(want) == 8


def test_an_exact_reduction_may_replace_a_lossy_one(tmp_path: Path):
    """The next loss belongs to the same parameters, so it is the same with both reductions."""
    keys = {"log.every_steps": 1, "eval.every_steps": 0, "checkpoint.every_steps": 2}
    assert run(tmp_path / "int8", steps=3, **keys | {"parallel.reduce": "int8"}) == 0
    shutil.copytree(tmp_path / "int8", tmp_path / "pmean")
    shutil.rmtree(tmp_path / "pmean/checkpoints/3")
    assert run(tmp_path / "pmean", steps=3, **keys) == 0
    int8, pmean = ([m["loss"] for m in lines(tmp_path / name) if "loss" in m] for name in ("int8", "pmean"))
    assert pmean == pytest.approx(int8, rel=1e-5) and len(pmean) == 3
