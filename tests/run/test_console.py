"""The lines and progress bars that a run prints."""

import re
import time
from typing import Any

import pytest

from jaxlm.config.files import load
from jaxlm.run import phases
from jaxlm.run.console import Reporter
from jaxlm.run.time_left import TimeLeft, coming
from tests.runs import CONFIG

LINE = {
    "step": 20,
    "loss": 9.0,
    "loss_mean": 1.5,
    "lr": 0.1,
    "grad_norm": 0.5,
    "mfu": None,
    "step_seconds": 2.0,
    "tokens_per_second": 10.0,
}
CLOCK = r"^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d "


@pytest.fixture
def reporter(monkeypatch: pytest.MonkeyPatch) -> Reporter:
    """Reports to a file, for 100 steps with an evaluation and a checkpoint every 50."""
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)
    return Reporter(load(CONFIG))


def test_samples_are_shown_as_they_are(capsys: Any, reporter: Reporter):
    """rich does not interpret its markup and names of emoji in a sample."""
    sample = "a[i:x:2] = b[:o:] [bold]c[/bold] \x1b[31m"
    scores = {"step": 1, "eval_loss": 1.0, "eval_perplexity": 2.7, "eval_bits_per_byte": None, "eval_accuracy": 0.5}
    reporter.evaluation(scores | {"sample": sample})
    assert "\n    │ a[i:x:2] = b[:o:] [bold]c[/bold] �[31m\n" in capsys.readouterr().out


def test_lines_have_the_mean_loss_the_time_of_day_and_the_time_left(capsys: Any, reporter: Reporter):
    reporter.train(LINE)
    line, estimate = capsys.readouterr().out.splitlines()
    assert re.match(CLOCK, line) and "loss 1.5000" in line and line.endswith("0:02:40 left without evaluations")
    assert estimate.endswith("2e+03 ms a step: about 0:02:40 left without evaluations")


def test_time_left_counts_evaluations_and_saves(monkeypatch: pytest.MonkeyPatch):
    now = 0.0

    def takes(seconds: float) -> Any:
        def act(step: int, state: Any) -> None:
            nonlocal now
            now += seconds

        return act

    monkeypatch.setattr(time, "monotonic", lambda: now)
    left = TimeLeft(load(CONFIG))
    left.timed("save", takes(3))(50, None)
    assert left.after(20, 2.0) == "0:02:46 left without evaluations"  # 160 s, and saves after steps 50 and 100
    left.timed("evaluation", takes(40))(50, None)
    left.timed("evaluation", takes(10))(60, None)  # the first one included compiling
    assert left.after(20, 2.0) == "0:03:06 left"
    assert left.after(50, 2.0) == "0:01:53 left"


@pytest.mark.parametrize("steps, period", [(10, 0), (10, 1), (10, 3), (10, 5), (10, 50)])
def test_coming_counts_the_remaining_calls_of_a_hook(steps: int, period: int):
    due = [step for step in range(1, steps + 1) if step == steps or (period and step % period == 0)]
    for step in range(steps + 1):
        assert coming(step, steps, period) == sum(d > step for d in due)


def test_a_long_phase_prints_lines_to_a_file(capsys: Any, monkeypatch: pytest.MonkeyPatch, reporter: Reporter):
    with reporter.phase("evaluating", 4) as advance:
        advance()
    assert capsys.readouterr().out == ""
    monkeypatch.setattr(phases, "LONG", 0.05)
    with reporter.phase("evaluating", 4) as advance:
        advance()
        time.sleep(0.2)
    with reporter.phase("restoring"):
        time.sleep(0.2)
    out = re.sub(CLOCK, "", capsys.readouterr().out, flags=re.M)
    assert re.search(r"^evaluating: 1 of 4 · 0:00:\d\d left$", out, flags=re.M)
    assert re.search(r"^evaluating: done in \d+\.\d s$", out, flags=re.M)
    assert re.search(r"^restoring: 0:00:\d\d so far$", out, flags=re.M)


def test_compilation_prints_a_line_before_and_after(capsys: Any, reporter: Reporter):
    with reporter.phase("compiling the step", ended="compiled"):
        assert re.fullmatch(CLOCK + "compiling the step …\n", capsys.readouterr().out)
    assert re.fullmatch(CLOCK + r"compiled in \d+\.\d s\n", capsys.readouterr().out)


def test_a_terminal_shows_bars_and_no_time_of_day(capsys: Any, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "150")
    shown = Reporter(load(CONFIG))
    with shown.phase("restoring"):
        pass
    shown.start(10)
    shown.train(LINE)
    with shown.phase("evaluating", 4) as advance:
        advance()
        shown.bar.refresh()
    shown.say("a line")
    shown.stop()
    out = re.sub(r"\x1b\[[?\d;]*[A-Za-z]", "", capsys.readouterr().out)
    assert "restoring" in out and "evaluating" in out and "1 of 4 · 0:00:" in out and "step 10/100" in out
    assert "loss 1.5000 · 10 tokens/s · 0:02:40 left without evaluations" in out
    assert "a line\n" in out and not re.search(CLOCK, out, flags=re.M)
