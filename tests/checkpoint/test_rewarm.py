"""A run that continues at a higher learning rate warms up again, and follows the same rates if it is stopped."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxlm.checkpoint.rewarm import between, of_run
from jaxlm.config import Config, UserError, files
from jaxlm.train.schedules import LEAST_WARMUP, LrHistory, Peak, make_schedule
from tests.configurations import BASE
from tests.runs import assert_identical, lines, numbers, run, state_of

MUON: tuple[Peak, ...] = ("lr", "adam_lr", "embed_lr")


def config(steps: int, **optim: Any) -> Config:
    keys = {"schedule": "wsd", "warmup_steps": 20} | optim
    return files.load(BASE, [f"--config.steps={steps}", *(f"--config.optim.{k}={v}" for k, v in keys.items())])


@pytest.mark.parametrize("schedule", ["wsd", "cosine", "linear"])
def test_all_rates_of_a_finished_run_warm_up_again(schedule: str) -> None:
    old, new = config(100, schedule=schedule), config(200, schedule=schedule)
    rewarm = between(old, None, new, 100)
    assert rewarm is not None
    for key in MUON:
        peak = getattr(new.optim, key)
        before = np.asarray(make_schedule(old.optim, 100, key)(np.arange(100)))
        schedules = [make_schedule(new.optim, 200, key, LrHistory(r)) for r in (None, rewarm)]
        plain, after = (np.asarray(schedule(np.arange(100, 200))) for schedule in schedules)
        assert plain[0] > 20 * before[-1], "without rewarm, the rate jumps"
        rising = before[-1] + (plain[:20] - before[-1]) * np.arange(1, 21) / 20
        np.testing.assert_allclose(after[:20], rising, rtol=1e-5)
        np.testing.assert_array_equal(after[20:], plain[20:])
        assert np.abs(np.diff(np.concatenate([before[-1:], after]))).max() <= peak / 20 * 1.001
    assert between(new, rewarm, new, 130) == rewarm  # stopped and resumed
    again = between(new, rewarm, config(400, schedule=schedule), 110)  # in the middle of the rise
    at_110 = float(make_schedule(new.optim, 200, "lr", LrHistory(rewarm))(109))
    assert schedule == "wsd" or (again is not None and again.step == 110 and again.rates["lr"] == at_110)


def test_nothing_changes_unless_a_rate_rises() -> None:
    wsd = config(100)
    for old, new, step in [
        (wsd, wsd, 50),
        (wsd, wsd, 10),  # rises, as planned
        (wsd, wsd, 100),
        (wsd, config(1000), 50),  # before its decay
        (wsd, config(100, lr=0.01, adam_lr=0.001), 50),
        (config(100, schedule="constant"), config(200, schedule="constant"), 100),
        (config(1000, schedule="cosine"), config(1001, schedule="cosine"), 500),
        (wsd, config(200, lr=1), 0),
    ]:
        assert between(old, None, new, step) is None


def test_a_run_that_went_back_to_step_0_keeps_its_rewarm(tmp_path: Path) -> None:
    """If it is stopped there, it resumes at the rates of a run that is not stopped."""
    new = config(200)
    rewarm = between(config(100), None, new, 100)
    assert rewarm is not None and between(new, rewarm, new, 0) == rewarm
    content = {
        "config": dataclasses.asdict(new),
        "vocab_size": 9,
        "data_fingerprint": "",
        "history": [],
        "rewarm": rewarm._asdict(),
    }
    (tmp_path / "config.json").write_text(json.dumps(content))
    assert of_run(new, tmp_path, 0, ()) == (None, None)  # a run without a checkpoint starts from scratch
    (tmp_path / "checkpoints/0").mkdir(parents=True)
    assert of_run(new, tmp_path, 0, ()) == (rewarm, None)


def test_a_higher_peak_causes_a_rewarm() -> None:
    rewarm = between(config(100), None, config(100, embed_lr=0.3, warmup_steps=0), 50)
    assert rewarm is not None and (rewarm.step, rewarm.updates) == (50, LEAST_WARMUP)
    assert rewarm.rates == pytest.approx({"lr": 0.02, "adam_lr": 0.004, "embed_lr": 0.1})


KEYS = {
    "optim.schedule": "linear",
    "optim.min_lr_ratio": 0,
    "log.every_steps": 1,
    "checkpoint.every_steps": 5,
    "eval.every_steps": 0,
    "model.dropout": 0,
}


def test_an_extended_run_rewarms_the_same_when_it_is_stopped(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    workdir = tmp_path / "run"
    assert run(workdir, steps=10, **KEYS) == 0
    assert run(workdir, steps=30, **KEYS) == 0
    said = [line for line in capsys.readouterr().out.splitlines() if "learning rate rises" in line]
    assert len(said) == 1 and f"over {LEAST_WARMUP} updates" in said[0]
    rates = [m["lr"] for m in lines(workdir) if "lr" in m]
    assert rates[9] == pytest.approx(0.003 / 9, rel=1e-4)
    last, planned = rates[9], [0.003 * (1 - (n - 1) / 29) for n in range(30)]
    for n in range(10, 30):
        assert rates[n] == pytest.approx(last + (planned[n] - last) * min((n - 9) / LEAST_WARMUP, 1), rel=1e-4)
    assert json.loads((workdir / "config.json").read_text())["rewarm"]["step"] == 10

    shutil.copytree(workdir, tmp_path / "stopped")
    for step in (20, 25, 30):
        shutil.rmtree(tmp_path / f"stopped/checkpoints/{step}")
    assert run(tmp_path / "stopped", steps=30, **KEYS) == 0  # resumes in the middle of the rise
    assert "learning rate rises" not in capsys.readouterr().out
    assert numbers(tmp_path / "stopped") == numbers(workdir)
    assert_identical(state_of(tmp_path / "stopped", 30).params, state_of(workdir, 30).params)

    saved = json.loads((workdir / "config.json").read_text())
    for wrong in ({"step": 10}, 5, {"step": 10, "updates": 0, "rates": {"lr": 1.0}}):
        (workdir / "config.json").write_text(json.dumps(saved | {"rewarm": wrong}))
        with pytest.raises(UserError, match=r"config\.json: rewarm is"):
            run(workdir, steps=40, **KEYS)
