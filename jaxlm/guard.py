"""Which updates are made: none of a loss or gradient that is not finite, or that is far from those before it.

Part of the step, and of the state, so that a run that goes on decides as one that was never stopped. A step that is
skipped leaves parameters, moments, average and residuals as they were, and counts as a step: its batch is used up, and
the learning rate's schedule goes on.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

WINDOW = 64  # of the newest good steps, whose medians say what is usual
LEAST = 32  # good steps before a norm counts as unusual: those of the first ones change fast
FLOOR = 0.1  # nats: below such a loss all is learned by heart, and a multiple of next to nothing is no sign


class Guard(NamedTuple):
    """The same on all devices."""

    losses: jax.Array  # float32 [WINDOW] of the newest good steps; nan where there are none yet
    norms: jax.Array  # of their gradients, before clipping
    skipped: jax.Array  # int32, steps of the whole run
    in_row: jax.Array  # int32, those since the last good one


def init() -> Guard:
    unknown, none = jnp.full(WINDOW, jnp.nan, jnp.float32), jnp.zeros((), jnp.int32)
    return Guard(unknown, unknown.copy(), none, none.copy())


def judge(guard: Guard, loss: jax.Array, norm: jax.Array, factor: float) -> tuple[jax.Array, Guard]:
    """Whether the update of a step is made, and the guard after it.

    Args:
      loss, norm: of the global batch, the same on all devices.
      factor: how many times its median each may be; 0 = any finite number.
    """
    good = jnp.isfinite(loss) & jnp.isfinite(norm)
    if factor:
        known, usual = jnp.sum(jnp.isfinite(guard.norms)), jnp.nanmedian(guard.losses)
        good &= (known == 0) | (loss <= factor * jnp.maximum(usual, FLOOR))
        good &= (known < LEAST) | (usual < FLOOR) | (norm <= factor * jnp.nanmedian(guard.norms))
    counts = good & (norm > 0)  # a batch without targets says nothing of what is usual

    def push(window: jax.Array, x: jax.Array) -> jax.Array:
        return jnp.where(counts, jnp.concatenate([window[1:], x[None]]), window)

    bad = 1 - good.astype(jnp.int32)
    return good, Guard(
        push(guard.losses, loss), push(guard.norms, norm), guard.skipped + bad, (guard.in_row + bad) * bad
    )


def either(good: jax.Array, new: Any, old: Any) -> Any:
    """`new` after a good step, else `old`; but a schedule's count of steps goes on."""

    def choose(new: Any, old: Any) -> Any:
        return new if isinstance(new, optax.ScaleByScheduleState) else jnp.where(good, new, old)

    return jax.tree.map(choose, new, old, is_leaf=lambda x: isinstance(x, optax.ScaleByScheduleState))
