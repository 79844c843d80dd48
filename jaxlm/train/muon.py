"""Muon for the hidden matrices, AdamW for the rest (Jordan et al., https://kellerjordan.github.io/posts/muon).

Muon orthogonalizes every hidden matrix. On a small model that takes a third of a step, so devices share the work
(sync/sharing.py).
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxlm.config import STACKS, OptimConfig
from jaxlm.sync.sharing import LayerSharing
from jaxlm.train.schedules import LrHistory, Schedule, make_schedule


def _groups(params: Any) -> Any:
    """Labels the parameters: 'muon' for the stacked matrices of the layers, 'table' for embeddings that are only looked
    up, 'adamw' for the rest.
    """
    tied = "head" not in params

    def label(path: Any, _: Any) -> str:
        if path[0].key in STACKS and path[-1].key == "kernel":
            return "muon"
        return "table" if path[-1].key == "embedding" and not (tied and path[0].key == "embed") else "adamw"

    return jax.tree_util.tree_map_with_path(label, params)


# Coefficients of a Newton-Schulz step (Jordan et al., https://kellerjordan.github.io/posts/muon)
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)


def orthogonalize(x: jax.Array) -> jax.Array:
    """Approximates the nearest (semi-)orthogonal matrix: singular values between 0.7 and 1.2. `[..., in, out]`

    Five Newton-Schulz steps.
    """
    a, b, c = NEWTON_SCHULZ
    wide = x.shape[-2] <= x.shape[-1]
    x = x if wide else jnp.swapaxes(x, -1, -2)
    x = x / (jnp.linalg.norm(x, axis=(-2, -1), keepdims=True) + 1e-8)
    for _ in range(5):
        gram = x @ jnp.swapaxes(x, -1, -2)
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x if wide else jnp.swapaxes(x, -1, -2)


def _orthogonalized(sharing: LayerSharing) -> optax.GradientTransformation:
    """Turns momenta `[L, in, out]` into orthogonal updates, scaled by sqrt(max(1, out / in))."""

    def act(x_LIO: jax.Array) -> jax.Array:
        return orthogonalize(x_LIO) * math.sqrt(max(1, x_LIO.shape[-1] / x_LIO.shape[-2]))

    def update(updates: Any, params: Any) -> Any:
        return jax.tree_util.tree_map_with_path(lambda path, x: sharing.on_layers(path, x, act), updates)

    return optax.stateless(update)


def muon(c: OptimConfig, steps: int, sharing: LayerSharing, history: LrHistory) -> optax.GradientTransformation:
    """Muon with Nesterov momentum for the matrices of the layers, AdamW for the rest."""
    adam_rate, embed_rate = (make_schedule(c, steps, key, history) for key in ("adam_lr", "embed_lr"))
    muon = optax.chain(
        optax.trace(c.momentum, nesterov=True),
        _orthogonalized(sharing),
        optax.add_decayed_weights(c.weight_decay),
        optax.scale_by_learning_rate(make_schedule(c, steps, "lr", history)),
    )

    def table_rate(path: Any) -> Schedule:
        # Most rows of a token table get a gradient in few steps; every row of a position table gets one in each step.
        return adam_rate if path[0].key in ("positions", "encoder_positions") else embed_rate

    def adamw(rate_of: Callable[[Any], Schedule]) -> optax.GradientTransformation:
        return optax.chain(optax.scale_by_adam(c.b1, c.b2, c.eps), _scale_by_rates(rate_of))

    return optax.partition({"muon": muon, "table": adamw(table_rate), "adamw": adamw(lambda path: adam_rate)}, _groups)


def _scale_by_rates(rate_of: Callable[[Any], Schedule]) -> optax.GradientTransformation:
    """optax.scale_by_learning_rate with a schedule for each path; the state is the same."""

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        updates = jax.tree_util.tree_map_with_path(lambda path, x: -rate_of(path)(state.count) * x, updates)
        return updates, optax.ScaleByScheduleState(optax.safe_increment(state.count))

    return optax.GradientTransformation(lambda params: optax.ScaleByScheduleState(jnp.zeros((), jnp.int32)), update)
