"""Compares learning-rate schedules with formulas and with optax."""

import dataclasses
import math
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxlm.config import OptimConfig, files
from jaxlm.train.schedules import SCHEDULES, make_schedule

STEPS = 40
BASE = files.load(Path(__file__).resolve().parents[2] / "configs" / "base.py").optim


def config(**changes: Any) -> OptimConfig:
    defaults = {"lr": 0.1, "schedule": "linear", "warmup_steps": 3, "decay_fraction": 0.4, "min_lr_ratio": 0.1}
    return dataclasses.replace(BASE, **(defaults | changes))


def expected_lr(schedule: str, n: int, steps: int, warmup: int, r: float) -> float:
    """Returns the factor of update n by the definitions. Warmup reaches the peak with its last update."""
    if n < warmup:
        return (n + 1) / warmup
    done = (n - warmup) / (steps - warmup)
    if schedule == "cosine":
        return (1 + r) / 2 + (1 - r) / 2 * math.cos(math.pi * done)
    if schedule == "linear":
        return (1 - done) + r * done
    if schedule == "rsqrt":
        return max(r, math.sqrt(max(warmup, 1)) / math.sqrt(n + 1))
    if schedule == "wsd":
        left = (steps - n) / (0.4 * steps)  # remaining share of the last 40%
        return 1.0 if left >= 1 else left + r * (1 - left)
    assert schedule == "constant"
    return 1.0


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("warmup", [0, 1, 10])
def test_schedule(schedule: str, warmup: int) -> None:
    steps, r, peak = 50, 0.1, 3.0
    rates = np.asarray(make_schedule(config(schedule=schedule, warmup_steps=warmup, lr=peak), steps)(jnp.arange(steps)))
    expected = [peak * expected_lr(schedule, n, steps, warmup, r) for n in range(steps)]
    np.testing.assert_allclose(rates, expected, rtol=2e-6)
    assert rates.max() == pytest.approx(peak) and rates.min() > 0
    assert (np.diff(rates[:warmup]) > 0).all() and (np.diff(rates[max(warmup - 1, 0) :]) <= 1e-6).all()
    if schedule != "constant":
        assert rates[-1] < peak / 2
        # The schedule reaches its end one step later, and stays there.
        late = make_schedule(config(schedule=schedule, warmup_steps=warmup, lr=peak), steps)(
            jnp.array([steps, 3 * steps])
        )
        if schedule != "rsqrt":
            np.testing.assert_allclose(late, peak * r, rtol=1e-6)


def test_schedules_equal_those_of_optax() -> None:
    steps, warmup, n = 50, 10, np.arange(50)
    after = np.maximum(n - warmup, 0)
    rise = optax.linear_schedule(0.0, 2.0, warmup)
    peers = {
        "cosine": optax.cosine_decay_schedule(2.0, steps - warmup, alpha=0.1),
        "linear": optax.linear_schedule(2.0, 0.2, steps - warmup),
    }
    for schedule, peer in peers.items():
        rates = make_schedule(config(schedule=schedule, warmup_steps=warmup, lr=2.0), steps)(jnp.asarray(n))
        np.testing.assert_allclose(rates, np.where(n < warmup, rise(n + 1), peer(after)), rtol=1e-5)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_schedules_at_their_limits(schedule: str) -> None:
    """Runs of one step, of warmup alone, and without decay have finite, positive rates."""
    for steps, warmup, fraction in [(1, 0, 0.4), (1, 1, 0.4), (5, 5, 0.4), (5, 0, 0.0), (5, 2, 1.0)]:
        c = config(schedule=schedule, warmup_steps=warmup, decay_fraction=fraction, min_lr_ratio=0.0)
        rates = np.asarray(make_schedule(c, steps)(jnp.arange(steps)))
        assert np.isfinite(rates).all() and (rates > 0).all() and (rates <= np.float32(0.1)).all(), (
            steps,
            warmup,
            rates,
        )
    flat_ = make_schedule(config(schedule="wsd", decay_fraction=0.0, warmup_steps=0), 5)(jnp.arange(5))
    np.testing.assert_allclose(flat_, 0.1, rtol=1e-6)


def test_another_peak_scales_the_schedule() -> None:
    c = config(schedule="cosine", adam_lr=0.5, embed_lr=0.0)
    n = jnp.arange(STEPS)
    for key in ("adam_lr", "embed_lr"):  # embed_lr 0 means adam_lr
        np.testing.assert_allclose(make_schedule(c, STEPS, key)(n), 5 * make_schedule(c, STEPS)(n), rtol=1e-6)
