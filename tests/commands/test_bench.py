"""`jaxlm bench` reports plausible times of the step and of the trainer, and skips no step."""

import json
from pathlib import Path

import pytest

from jaxlm.commands import bench
from jaxlm.config import UserError
from jaxlm.train import guard
from tests.runs import CONFIG, flags


def test_step_and_trainer_are_timed_and_no_step_is_skipped(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """If the model memorized the batch of the step alone, these many steps would make all other batches spikes."""
    made: list[bench.Trainer] = []
    summary = bench.summary
    monkeypatch.setattr(bench, "summary", lambda ours, rounds: made.append(ours) or summary(ours, rounds))
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
