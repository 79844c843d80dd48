"""Learning-rate schedules."""

import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from jaxlm.config import OptimConfig

Schedule = Callable[[Any], Any]  # updates done -> learning rate
Peak = Literal["lr", "adam_lr", "embed_lr"]  # the keys of peak rates; all optimizers but muon read `lr` alone


class Rewarm(NamedTuple):
    """A second warmup (rewarm.py)."""

    step: int  # updates done when the run went on
    updates: int  # after which the rate is that of the schedule
    rates: dict[Peak, float]  # from which it rises: those of the last update before


class Cut(NamedTuple):
    """A return to an earlier checkpoint (recovery.py)."""

    step: int  # updates done in that checkpoint
    factor: float  # on the learning rates from there on


class LrHistory(NamedTuple):
    """Events of a run that change its learning rates."""

    rewarm: Rewarm | None = None
    cuts: tuple[Cut, ...] = ()


UNTOUCHED = LrHistory()
LEAST_WARMUP = 10  # updates of a second warmup, where optim.warmup_steps is less


def make_schedule(c: OptimConfig, steps: int, key: Peak = "lr", history: LrHistory = UNTOUCHED) -> Schedule:
    """Learning rate of the update after `n` updates, n = 0 ... steps - 1.

    Warmup rises linearly and reaches the peak at n = warmup_steps - 1. Then, with p the share of the
    remaining updates that are done, and r = min_lr_ratio, the peak is multiplied by

    - constant: 1
    - linear: 1 - (1 - r) p
    - cosine: r + (1 - r) (1 + cos(pi p)) / 2 (Loshchilov and Hutter, SGDR)
    - rsqrt: sqrt(max(warmup, 1) / (n + 1)), at least r (Vaswani et al.)
    - wsd: 1, then linearly to r over the last `decay_fraction` of all steps (Hu et al., MiniCPM)

    From each of `history.cuts` on, the rate is multiplied by a factor, and warms up again from 0. With `history.rewarm`
    it rises linearly from the one there to that of the schedule; a run that goes back to a checkpoint before that stays
    at the low rate until then.
    """
    peak = (c.embed_lr or c.adam_lr) if key == "embed_lr" else getattr(c, key)
    warmup = c.warmup_steps

    def schedule(n: jax.Array | int) -> jax.Array:
        n = jnp.asarray(n, jnp.float32)
        p = jnp.clip((n - warmup) / max(steps - warmup, 1), 0, 1)
        if c.schedule == "linear":
            factor = 1 - (1 - c.min_lr_ratio) * p
        elif c.schedule == "cosine":
            factor = c.min_lr_ratio + (1 - c.min_lr_ratio) * (1 + jnp.cos(math.pi * p)) / 2
        elif c.schedule == "rsqrt":
            factor = jnp.maximum(jnp.sqrt(max(warmup, 1) / jnp.maximum(n + 1, max(warmup, 1))), c.min_lr_ratio)
        elif c.schedule == "wsd":
            decay = max(c.decay_fraction * steps, 1)
            factor = 1 - (1 - c.min_lr_ratio) * jnp.clip((n - (steps - decay)) / decay, 0, 1)
        else:
            factor = jnp.ones(())
        rise = jnp.minimum((n + 1) / max(warmup, 1), 1)
        for cut in history.cuts:
            again = jnp.minimum((n + 1 - cut.step) / max(warmup, LEAST_WARMUP), 1)
            factor = jnp.where(n >= cut.step, factor * cut.factor, factor)
            rise = jnp.where(n >= cut.step, jnp.minimum(rise, again), rise)
        rate = peak * factor * rise
        if (rewarm := history.rewarm) is None:
            return rate
        share = jnp.clip((n + 1 - rewarm.step) / rewarm.updates, 0, 1)
        return rewarm.rates[key] * (1 - share) + rate * share

    return schedule
