"""The guard: keeps numbers that are not finite out of the parameters, and scales down gradient spikes.

A spike is a gradient whose norm exceeds `optim.spike_factor` times the root mean square of the recent norms; the guard
scales it down to that limit. It drops no finite batch unless `optim.on_spike` is skip. Like ZClip (Kumar et al., 2025)
and AdaGC (Wang et al., 2025), it averages the norms after scaling: a single spike hardly moves the limit, and a norm
that has changed for good moves it within a few steps. A mean of squares also suits rare large gradients: if one batch
in twenty has one, these batches set the limit themselves.

The guard is part of the step and of the state, so a resumed run decides as one that was never stopped. A skipped step
leaves parameters, moments, moving average and residuals unchanged. It still counts as a step: its batch is used up, and
the learning-rate schedule advances.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxlm.config import OptimConfig
from jaxlm.sync import Group

DECAY = 0.97  # of the running mean of squared norms: about 33 steps
LEAST = 32  # no norm is a spike until the mean holds this many, because the first norms change fast
LARGEST = 1e18  # a larger norm enters the mean as this one, whose square is finite in float32
HIGH = 2.0  # a loss above this multiple of an untrained model's is high; many in a row mean that training diverged


class Guard(NamedTuple):
    """Scalars, the same on all devices."""

    mean_square: jax.Array  # float32, running mean of the squared gradient norms, after scaling
    known: jax.Array  # int32, norms in it
    first_loss: jax.Array  # float32, loss of the first good step; 0 before it
    skipped: jax.Array  # int32, skipped steps in the whole run
    spikes: jax.Array  # int32, spikes in the whole run
    in_row: jax.Array  # int32, skipped steps in a row
    high: jax.Array  # int32, high losses in a row (HIGH)


class OldGuard(NamedTuple):
    """The guard of older checkpoints: windows of 64 losses and norms."""

    losses: Any
    norms: Any
    skipped: Any
    in_row: Any


class Numbers(NamedTuple):
    """The numbers that the guard judges; float32 scalars."""

    nll: jax.Array  # sum over the targets of the global batch, divided by the number of devices
    norm: jax.Array  # of the gradient, before any scaling
    mean_square: jax.Array
    first_loss: jax.Array


def init() -> Guard:
    zero, none = jnp.zeros((), jnp.float32), jnp.zeros((), jnp.int32)
    return Guard(zero, none, zero.copy(), none.copy(), none.copy(), none.copy(), none.copy())


def old(like: Guard) -> OldGuard:
    """The shapes and shardings of an older checkpoint's guard."""
    scalar, count = like.mean_square, like.skipped
    window = jax.ShapeDtypeStruct((64,), scalar.dtype, sharding=scalar.sharding)
    return OldGuard(window, window, count, count)


def upgraded(saved: Any, fresh: Guard) -> Guard:
    """The guard of a checkpoint. An older one keeps its count of skipped steps; its statistics start afresh."""
    if isinstance(saved, Guard):
        return saved
    return fresh if saved is None else fresh._replace(skipped=saved.skipped)


def agree(guard: Guard, nll: jax.Array, norm: jax.Array, group: Group) -> Numbers:
    """Returns the numbers of a step, bit for bit the same on all devices.

    Devices compute the norm from the same gradients, but processors of different kinds round differently. A collective
    gives the same result everywhere; `judge` then compares only products of such results, which every processor rounds
    alike.
    """
    return Numbers(*group.mean(jnp.stack([nll, norm, guard.mean_square, guard.first_loss])))


def judge(
    guard: Guard, x: Numbers, targets: jax.Array, c: OptimConfig, vocab_size: int
) -> tuple[jax.Array, jax.Array, Guard]:
    """Decides whether a step updates the parameters, and by which factor its gradient is scaled.

    Args:
      x: from `agree`.
      targets: number of targets in the global batch, divided by the number of devices.

    Returns:
      (whether the step is accepted, factor on its gradient, guard after the step).
    """
    finite = jnp.isfinite(x.nll) & jnp.isfinite(x.norm)
    square, limit = jnp.square(jnp.minimum(x.norm, LARGEST)), c.spike_factor**2 * x.mean_square
    # A mean of zero means that the squares underflowed in float32, not that every gradient is a spike.
    spike = finite & (guard.known >= LEAST) & (limit > 0) & (square > limit) & (c.spike_factor > 0)
    scale = jnp.where(spike, jnp.sqrt(limit) / x.norm, 1.0)
    accepted = {"scale": finite, "skip": finite & ~spike}[c.on_spike]
    untrained_loss = jnp.maximum(math.log(vocab_size), x.first_loss)
    high = ~(x.nll <= HIGH * untrained_loss * targets)  # also true for NaN

    counts = finite & (x.norm > 0)  # a batch without targets has a norm of 0, which is no measure
    known = guard.known + counts
    weight = jnp.maximum(1 / jnp.maximum(known, 1), 1 - DECAY)  # a plain mean at first
    mean_square = x.mean_square + weight * (jnp.where(spike, limit, square) - x.mean_square)
    skipped = (~accepted).astype(jnp.int32)
    after = Guard(
        mean_square=jnp.where(counts, mean_square, x.mean_square),
        known=known,
        first_loss=jnp.where(counts & (guard.known == 0), x.nll / targets, x.first_loss),
        skipped=guard.skipped + skipped,
        spikes=guard.spikes + spike,
        in_row=(guard.in_row + skipped) * skipped,
        high=(guard.high + high) * high,
    )
    return accepted, scale, after


def either(accepted: jax.Array, new: Any, old: Any) -> Any:
    """Returns `new` if the step is accepted, else `old`; the count of a schedule always advances."""

    def choose(new: Any, old: Any) -> Any:
        return new if isinstance(new, optax.ScaleByScheduleState) else jnp.where(accepted, new, old)

    return jax.tree.map(choose, new, old, is_leaf=lambda x: isinstance(x, optax.ScaleByScheduleState))
