"""`jaxlm bench` reports plausible times of the step and of the trainer, and skips no step."""

import json
import re
from pathlib import Path

import pytest

from jaxlm.commands import bench, bench_sweep
from jaxlm.config import UserError, grid
from jaxlm.train import guard
from tests.runs import CONFIG, flags


def test_step_and_trainer_are_timed_and_no_step_is_skipped(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """If the model memorized the batch of the step alone, these many steps would make all other batches spikes."""
    made: list[bench.Trainer] = []
    summary = bench.summary
    monkeypatch.setattr(bench, "summary", lambda ours, *args: made.append(ours) or summary(ours, *args))
    arguments = ["--config", str(CONFIG), *flags(**{"optim.lr": 1.0}), "--rounds", "2"]
    arguments += ["--steps", str(4 * guard.LEAST)]
    assert bench.main(arguments) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0].endswith("warming up with 100 steps")
    assert [line.split(" · ")[0] for line in out[1:-1]] == ["round 1/2", "round 2/2"]
    result = json.loads(out[-1])
    assert result["step_ms"] > 0 and 0.2 < result["trainer_over_step"] < 20  # wide limits, because machines are noisy
    assert result["tokens_per_second"] == pytest.approx(8 * 16 / result["trainer_ms"] * 1e3)
    assert int(made[0].state.guard.skipped) == 0


@pytest.mark.parametrize("argv, words", [(["--rounds", "0"], "--rounds is 0"), (["--config.seq_lenn=3"], "seq_len")])
def test_wrong_arguments_are_refused(argv: list[str], words: str):
    with pytest.raises(UserError, match=words):
        bench.main(["--config", str(CONFIG), *argv])


def test_a_folder_without_nanogpt_is_refused(tmp_path: Path):
    with pytest.raises(UserError, match=r"no model\.py in it"):
        bench.main(["--config", str(CONFIG), *flags(), "--nanogpt", str(tmp_path)])


@pytest.mark.parametrize(
    "seconds, steps", [(0.001, (80, 20)), (0.45, (80, 20)), (1.0, (36, 9)), (5.0, (7, 1)), (50.0, (1, 1))]
)
def test_warming_up_takes_at_most_a_minute(seconds: float, steps: tuple[int, int]):
    assert bench.warm_up_steps(seconds) == steps
    assert seconds * sum(steps) <= 60 or steps == (1, 1)


def test_a_grid_has_every_combination_and_the_last_key_changes_first():
    found = grid.points(["config=a,b", "model.remat=none,full"])
    assert found == [{"config": c, "model.remat": r} for c in "ab" for r in ("none", "full")]
    assert bench_sweep.arguments(found[3], "c", ["--x"]) == ["--config", "b", "--x", "--config.model.remat=full"]


@pytest.mark.ci
def test_a_sweep_measures_each_point_beside_its_plan_and_goes_on_after_a_failure(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    page = tmp_path / "sweep.html"
    arguments = ["--config", str(CONFIG), *flags(), "--rounds", "2", "--steps", "2", "--html", str(page)]
    # Three devices cannot share 8 sequences.
    assert bench.main([*arguments, "--grid", "parallel.devices=1,3"]) == 0
    out = capsys.readouterr().out.splitlines()
    good, bad = json.loads(out[-1])["points"]
    assert good["point"] == {"parallel.devices": "1"} and "batch_size is 8" in bad["error"]
    low, high = good["step_ms_range"]
    assert low <= good["step_ms"] <= high
    # A process of its own: within a third of the plan, because so small a model is almost all process.
    assert good["peak_memory_bytes"] == pytest.approx(good["planned_memory_bytes"], rel=1 / 3)
    assert page.read_text().count(f"{good['tokens_per_second']:,.0f}") == 2  # as a bar and in the table


@pytest.mark.parametrize(
    "argv, words",
    [
        (["--grid", "batch_size"], "KEY=A,B"),
        (["--grid", "batch_size=8", "--grid", "config.batch_size=16"], "twice"),
        (["--grid", "model.remat=none,bad"], "model.remat is 'bad'"),
        (["--html", "x.html"], "without --grid"),
        (["--grid", "seed=1", "--html", "/"], "--html is /"),
        (["--grid", "model.activation=relu", "--torch"], "model.activation is relu"),
        (["--torch"], "model.activation is relu2"),
    ],
)
def test_a_wrong_sweep_or_peer_is_refused_before_anything_is_measured(argv: list[str], words: str):
    with pytest.raises(UserError, match=re.escape(words)):
        bench.main(["--config", str(CONFIG), *flags(), *argv])
