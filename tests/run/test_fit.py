"""A time limit lowers the number of steps if not all fit, and the schedule follows the lower number."""

import json
import re
import time
from pathlib import Path

import pytest

from jaxlm.config import UserError
from jaxlm.config.files import load
from jaxlm.main import run as main
from jaxlm.run import training
from jaxlm.run.time_budget import SHARE, fit, fitting
from tests.runs import CONFIG, flags, lines


@pytest.mark.parametrize(
    ("left", "expected"),
    [(1000 / SHARE + 1, 1000), (1000 / SHARE - 1, 998 - 5), (5, 0), (0, -4)],
    ids=["all", "nearly all", "none", "late"],
)
def test_steps_that_fit(left: float, expected: int):
    """Asks for 1000 steps of a second each; another number of steps takes 5 seconds to compile."""
    assert fitting(1000, left, compiling=5.0, seconds=1.0) == pytest.approx(expected, abs=1)


@pytest.mark.ci
def test_a_run_in_a_time_limit(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    workdir = tmp_path / "run"
    keys = {"optim.schedule": "linear", "optim.lr": 0.01, "eval.every_steps": 0, "checkpoint.every_steps": 0}
    arguments = ["--config", str(CONFIG), "--workdir", str(workdir), *flags(**keys | {"steps": 10**8})]
    began = time.monotonic()
    assert main([*arguments, "--max_minutes", "0.5"]) == 0
    assert time.monotonic() - began < 1.5 * 0.5 * 60
    shown = capsys.readouterr().out
    steps = json.loads((workdir / "config.json").read_text())["config"]["steps"]
    assert f"{steps} of {10**8} steps fit" in shown and 10 < steps < 10**6
    assert [m["step"] for m in lines(workdir) if "loss" in m][-1] == steps
    assert [m["lr"] for m in lines(workdir) if "lr" in m][-1] == pytest.approx(0.01 / (steps - 1), rel=0.01)

    # From now on the run keeps its number of steps, whatever the time limit.
    assert main([*arguments, "--max_minutes", "0.01"]) == 0
    assert "finished" in capsys.readouterr().out


def test_enough_time_changes_nothing():
    config = load(CONFIG, flags(steps=30))
    assert fit(config, time.monotonic() + 600) == config


def test_time_for_no_step_is_refused(tmp_path: Path):
    with pytest.raises(UserError, match=r"--max_minutes: 0 steps of .* ms fit") as error:
        training.run(load(CONFIG, flags()), tmp_path / "run", deadline=time.monotonic())
    assert re.search(r"allowed: time for 1 or more", str(error.value))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("minutes", ["0", "-1", "nan", "inf"])
def test_impossible_limits_are_refused(minutes: str, tmp_path: Path):
    with pytest.raises(UserError, match=r"--max_minutes is .*; allowed: more than 0"):
        main(["--config", str(CONFIG), "--workdir", str(tmp_path / "run"), "--max_minutes", minutes])
