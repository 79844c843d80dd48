"""The mean loss of the steps since the last training line of metrics.jsonl.

It is part of the train state, so that a run resumed between two lines writes the same next line as one that never
stopped.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxlm.config import Config


class LossMean(NamedTuple):
    """Scalars, the same on all devices."""

    value: jax.Array  # float32, nats
    count: jax.Array  # int32, steps in it


def init() -> LossMean:
    return LossMean(jnp.zeros((), jnp.float32), jnp.zeros((), jnp.int32))


def is_logged(step: Any, config: Config) -> Any:
    """Whether a training line is written after this step: the first, every Nth and the last."""
    return (step == 1) | (step == config.steps) | (step % config.log.every_steps == 0)


def push(mean: LossMean, loss: jax.Array, step: jax.Array, config: Config) -> tuple[jax.Array, LossMean]:
    """Adds the loss of one step. Returns the mean so far (NaN if no loss was finite) and the mean to keep in the state,
    which starts afresh after a training line.

    A loss that is not finite, such as that of a batch without targets, is left out.

    Args:
      step: updates done, this one included.
    """
    finite = jnp.isfinite(loss)
    count = mean.count + finite
    value = jnp.where(finite, mean.value + (loss - mean.value) / jnp.maximum(count, 1), mean.value)
    new = LossMean(value, count)
    kept = jax.tree.map(lambda fresh, x: jnp.where(is_logged(step, config), fresh, x), init(), new)
    return jnp.where(count > 0, value, jnp.nan), kept
