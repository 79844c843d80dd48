"""Learning-rate schedules."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxlm.config import OptimConfig
from jaxlm.config.own_values import Peak

Schedule = Callable[[Any], Any]  # updates done -> learning rate


class Rewarm(NamedTuple):
    """A second warmup (rewarm.py)."""

    step: int  # updates done when it begins
    updates: int  # its length; afterwards the rate is the schedule's
    rates: dict[Peak, float]  # at its beginning: the rates of the last update before


class Cut(NamedTuple):
    """A return to an earlier checkpoint (rollback.py)."""

    step: int  # of that checkpoint
    factor: float  # on all later learning rates


class LrHistory(NamedTuple):
    """Events of a run that change its learning rates."""

    rewarm: Rewarm | None = None
    cuts: tuple[Cut, ...] = ()


UNTOUCHED = LrHistory()
LEAST_WARMUP = 10  # updates; a second warmup is at least this long, even if optim.warmup_steps is less


def _constant(c: OptimConfig, steps: int, n: jax.Array) -> jax.Array:
    return jnp.ones(())


def _linear(c: OptimConfig, steps: int, n: jax.Array) -> jax.Array:
    return 1 - (1 - c.min_lr_ratio) * _progress(c, steps, n)


def _cosine(c: OptimConfig, steps: int, n: jax.Array) -> jax.Array:
    """Loshchilov and Hutter, SGDR."""
    return c.min_lr_ratio + (1 - c.min_lr_ratio) * (1 + jnp.cos(math.pi * _progress(c, steps, n))) / 2


def _rsqrt(c: OptimConfig, steps: int, n: jax.Array) -> jax.Array:
    """Vaswani et al., Attention Is All You Need."""
    warmup = max(c.warmup_steps, 1)
    return jnp.maximum(jnp.sqrt(warmup / jnp.maximum(n + 1, warmup)), c.min_lr_ratio)


def _wsd(c: OptimConfig, steps: int, n: jax.Array) -> jax.Array:
    """Hu et al., MiniCPM."""
    decay = max(c.decay_fraction * steps, 1)
    return 1 - (1 - c.min_lr_ratio) * jnp.clip((n - (steps - decay)) / decay, 0, 1)


def _progress(c: OptimConfig, steps: int, n: jax.Array) -> jax.Array:
    """The share of the updates after warmup that are done, 0 to 1."""
    return jnp.clip((n - c.warmup_steps) / max(steps - c.warmup_steps, 1), 0, 1)


# {optim.schedule: (config, steps, n) -> factor on the peak rate, for the update after `n` of `steps` updates}
SCHEDULES: dict[str, Callable[[OptimConfig, int, jax.Array], jax.Array]] = {
    "constant": _constant,
    "linear": _linear,
    "cosine": _cosine,
    "rsqrt": _rsqrt,
    "wsd": _wsd,
}


def make_schedule(c: OptimConfig, steps: int, key: Peak = "lr", history: LrHistory = UNTOUCHED) -> Schedule:
    """Returns the schedule: n -> learning rate of the update after `n` updates, n = 0 ... steps - 1.

    Warmup rises linearly and reaches the peak at n = warmup_steps - 1. Afterwards, with p the share of the remaining
    updates that are done, and r = min_lr_ratio, the peak is multiplied by

    - constant: 1
    - linear: 1 - (1 - r) p
    - cosine: r + (1 - r) (1 + cos(pi p)) / 2
    - rsqrt: sqrt(max(warmup, 1) / (n + 1)), at least r
    - wsd: 1, then linearly to r over the last `decay_fraction` of all steps

    Each of `history.cuts` multiplies all later rates by a factor, and the rate warms up again from 0. With
    `history.rewarm` the rate rises linearly from the one given there to the schedule's. A run that goes back to a
    checkpoint before that rise stays at the low rate until the rise begins.
    """
    peak = (c.embed_lr or c.adam_lr) if key == "embed_lr" else getattr(c, key)
    warmup = c.warmup_steps

    def schedule(n: jax.Array | int) -> jax.Array:
        n = jnp.asarray(n, jnp.float32)
        factor = SCHEDULES[c.schedule](c, steps, n)
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
