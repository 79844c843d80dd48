"""Learning-rate schedules and optax chains. Clipping is the step's: only it knows the global gradient norm."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from optax.contrib import MuonDimensionNumbers

from jaxlm.config import OptimConfig

Schedule = Callable[[jax.Array | int], jax.Array]


def make_schedule(c: OptimConfig, steps: int, peak: float | None = None) -> Schedule:
    """Learning rate of the update after `n` updates, n = 0 ... steps - 1.

    Warmup rises linearly and reaches the peak at n = warmup_steps - 1. Then, with p the share of the
    remaining updates that are done, and r = min_lr_ratio, the peak is multiplied by

    - constant: 1
    - linear: 1 - (1 - r) p
    - cosine: r + (1 - r) (1 + cos(pi p)) / 2 (Loshchilov and Hutter, SGDR)
    - rsqrt: sqrt(max(warmup, 1) / (n + 1)), at least r (Vaswani et al.)
    - wsd: 1, then linearly to r over the last `decay_fraction` of all steps (Hu et al., MiniCPM)
    """
    peak = c.lr if peak is None else peak
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
        return peak * factor * jnp.minimum((n + 1) / max(warmup, 1), 1)

    return schedule


def is_matrix(params: Any) -> Any:
    """True for the weights of linear layers and embeddings; by name, since stacked layers add a dimension."""
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key in ("kernel", "embedding"), params)


def _muon_dimensions(params: Any) -> Any:
    """The hidden matrices, `[..., in, out]`; None, for AdamW, is all else, input and output layers too."""

    def dimensions(path: Any, _: Any) -> MuonDimensionNumbers | None:
        hidden = path[0].key == "layers" and path[-1].key == "kernel"
        return MuonDimensionNumbers(-2, -1) if hidden else None

    return jax.tree_util.tree_map_with_path(dimensions, params)


def make_optimizer(c: OptimConfig, steps: int) -> optax.GradientTransformation:
    """The optax chain of a configuration, from averaged (and clipped) gradients to updates."""
    schedule = make_schedule(c, steps)
    if c.name == "muon":
        return optax.contrib.muon(
            schedule,
            beta=c.momentum,
            weight_decay=c.weight_decay,
            adam_b1=c.b1,
            adam_b2=c.b2,
            adam_weight_decay=0.0,
            adam_learning_rate=make_schedule(c, steps, c.adam_lr),
            muon_weight_dimension_numbers=_muon_dimensions,
        )
    scale = {
        "adamw": lambda: optax.scale_by_adam(c.b1, c.b2, c.eps),
        "lion": lambda: optax.scale_by_lion(c.b1, c.b2),
        "adafactor": lambda: optax.chain(
            optax.scale_by_factored_rms(decay_rate=0.8, epsilon=c.eps**2), optax.clip_by_block_rms(1.0)
        ),
        "sgd": lambda: optax.trace(c.momentum, nesterov=True),
    }[c.name]()
    return optax.chain(
        scale, optax.add_decayed_weights(c.weight_decay, mask=is_matrix), optax.scale_by_learning_rate(schedule)
    )
