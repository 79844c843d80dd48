"""The mean loss since the previous training line: as in NumPy, and the same if the run is stopped in between."""

import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.config.files import load
from jaxlm.run import training
from jaxlm.train import loss_mean
from jaxlm.train.loop import Done
from tests.runs import CONFIG, flags, lines, numbers, run

STEPS = 12
KEYS = {"steps": STEPS, "eval.every_steps": 0, "checkpoint.every_steps": 7, "log.every_steps": 5}


@pytest.mark.parametrize("every", [1, 4, 50])
def test_mean_of_finite_losses(every: int):
    losses = np.random.default_rng(0).uniform(1, 9, 23).astype(np.float32)
    losses[[3, 9]] = np.nan, np.inf
    losses[4:8] = np.nan  # if `every` is 4, there is nothing to average here
    config = load(CONFIG, flags(steps=len(losses), log__every_steps=every, eval__every_steps=0))
    push = jax.jit(lambda mean, loss, step: loss_mean.push(mean, loss, step, config))
    mean, last = loss_mean.init(), 0
    for step in range(1, len(losses) + 1):
        value, mean = push(mean, losses[step - 1], jnp.int32(step))
        if loss_mean.is_logged(step, config):
            since = losses[last:step]
            want = since[np.isfinite(since)].mean(dtype=np.float64) if np.isfinite(since).any() else np.nan
            np.testing.assert_allclose(value, want, rtol=1e-6)
            last = step
    assert last == len(losses) and int(mean.count) == 0


def test_a_run_stopped_between_two_lines_writes_the_same_next_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    losses: dict[int, float] = {}
    make_on_step = training.make_on_step

    def make_noting(*args: Any) -> Any:
        on_step = make_on_step(*args)

        def note(done: Done) -> None:
            losses[done.step] = float(done.metrics["loss"])
            on_step(done)

        return note

    monkeypatch.setattr(training, "make_on_step", make_noting)
    assert run(tmp_path / "whole", **KEYS) == 0
    found = {m["step"]: m["loss_mean"] for m in lines(tmp_path / "whole") if "loss" in m}
    spans = {1: [1], 5: [2, 3, 4, 5], 10: [6, 7, 8, 9, 10], 12: [11, 12]}
    assert found == pytest.approx({step: np.mean([losses[i] for i in span]) for step, span in spans.items()}, rel=1e-6)
    assert len(set(losses.values())) == STEPS

    shutil.copytree(tmp_path / "whole", tmp_path / "stopped")
    shutil.rmtree(tmp_path / "stopped/checkpoints" / str(STEPS))  # as if killed after step 7
    assert run(tmp_path / "stopped", **KEYS) == 0
    assert numbers(tmp_path / "stopped") == numbers(tmp_path / "whole")
