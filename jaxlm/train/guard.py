"""The guard: keeps numbers that are not finite out of the parameters, and scales down gradients that are spikes.

No finite batch is dropped because it surprises, unless `optim.on_spike` is skip. A spike is a gradient whose norm is
more than `optim.spike_factor` times the root mean square of the recent ones; it is scaled down to that limit. Like
ZClip (Kumar et al., 2025) and AdaGC (Wang et al., 2025), the guard averages the norms after scaling: a single spike
hardly moves the limit, but a norm that has changed for good moves it within a few steps. A mean of squares suits rare
large gradients, too: where one batch in twenty surprises, these batches set the limit themselves.

The guard is part of the step and of the state, so a resumed run decides as one that was never stopped. A skipped step
leaves parameters, moments, average and residuals as they were. It still counts as a step: its batch is used up, and
the learning rate's schedule goes on.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxlm.config import OptimConfig
from jaxlm.sync import Group

DECAY = 0.97  # of the running mean of squared norms: about 33 steps
LEAST = 32  # norms to know before one counts as a spike: the first ones change fast
LARGEST = 1e18  # of a norm in the mean: its square is finite in float32
HIGH = 2.0  # times a loss that nothing was learned from; such a loss, again and again, means that training diverged


class Guard(NamedTuple):
    """Scalars, the same on all devices."""

    mean_square: jax.Array  # float32, running mean of the squared gradient norms, after scaling
    known: jax.Array  # int32, norms in it
    first_loss: jax.Array  # float32, of the first good step; 0 before it
    skipped: jax.Array  # int32, steps of the whole run
    spikes: jax.Array  # int32, of the whole run
    in_row: jax.Array  # int32, steps skipped since the last good one
    high: jax.Array  # int32, losses in a row that are much higher than those of a model that knows nothing


class OldGuard(NamedTuple):
    """What older checkpoints hold instead: windows of 64 losses and norms."""

    losses: Any
    norms: Any
    skipped: Any
    in_row: Any


class Numbers(NamedTuple):
    """What is judged; float32 scalars."""

    nll: jax.Array  # of the targets of the global batch, divided by the number of devices
    norm: jax.Array  # of the gradient, before any scaling
    mean_square: jax.Array
    first_loss: jax.Array


def init() -> Guard:
    zero, none = jnp.zeros((), jnp.float32), jnp.zeros((), jnp.int32)
    return Guard(zero, none, zero.copy(), none.copy(), none.copy(), none.copy(), none.copy())


def old(like: Guard) -> OldGuard:
    """The shapes and places of an older checkpoint's guard."""
    scalar, count = like.mean_square, like.skipped
    window = jax.ShapeDtypeStruct((64,), scalar.dtype, sharding=scalar.sharding)
    return OldGuard(window, window, count, count)


def upgraded(saved: Any, fresh: Guard) -> Guard:
    """The guard of a checkpoint. An older one keeps its number of skipped steps and learns anew what is usual."""
    if isinstance(saved, Guard):
        return saved
    return fresh if saved is None else fresh._replace(skipped=saved.skipped)


def agree(guard: Guard, nll: jax.Array, norm: jax.Array, group: Group) -> Numbers:
    """The numbers of a step, bit for bit the same on all devices.

    Devices compute the norm from the same gradients, but processors of different kinds round differently. What comes
    out of a collective is the same everywhere; `judge` then compares only products of such numbers, which every
    processor rounds alike.
    """
    return Numbers(*group.mean(jnp.stack([nll, norm, guard.mean_square, guard.first_loss])))


def judge(
    guard: Guard, x: Numbers, targets: jax.Array, c: OptimConfig, vocab_size: int
) -> tuple[jax.Array, jax.Array, Guard]:
    """Judges a step.

    Args:
      x: from `agree`.
      targets: of the global batch, divided by the number of devices.

    Returns:
      Whether the update is made, the factor by which to scale the gradient first, and the guard after the step.
    """
    good = jnp.isfinite(x.nll) & jnp.isfinite(x.norm)
    square, limit = jnp.square(jnp.minimum(x.norm, LARGEST)), c.spike_factor**2 * x.mean_square
    # A mean of zero says that squares were too small for float32, not that every gradient is a spike.
    spike = good & (guard.known >= LEAST) & (limit > 0) & (square > limit) & (c.spike_factor > 0)
    scale = jnp.where(spike, jnp.sqrt(limit) / x.norm, 1.0)
    updated = {"scale": good, "skip": good & ~spike}[c.on_spike]
    known_nothing = jnp.maximum(math.log(vocab_size), x.first_loss)
    high = ~(x.nll <= HIGH * known_nothing * targets)  # true where it is not finite, too

    counts = good & (x.norm > 0)  # a batch without targets says nothing of what is usual
    known = guard.known + counts
    weight = jnp.maximum(1 / jnp.maximum(known, 1), 1 - DECAY)  # a plain mean at first
    mean_square = x.mean_square + weight * (jnp.where(spike, limit, square) - x.mean_square)
    skipped = (~updated).astype(jnp.int32)
    after = Guard(
        mean_square=jnp.where(counts, mean_square, x.mean_square),
        known=known,
        first_loss=jnp.where(counts & (guard.known == 0), x.nll / targets, x.first_loss),
        skipped=guard.skipped + skipped,
        spikes=guard.spikes + spike,
        in_row=(guard.in_row + skipped) * skipped,
        high=(guard.high + high) * high,
    )
    return updated, scale, after


def either(good: jax.Array, new: Any, old: Any) -> Any:
    """`new` after a good step, else `old`; but a schedule's count of steps goes on."""

    def choose(new: Any, old: Any) -> Any:
        return new if isinstance(new, optax.ScaleByScheduleState) else jnp.where(good, new, old)

    return jax.tree.map(choose, new, old, is_leaf=lambda x: isinstance(x, optax.ScaleByScheduleState))
