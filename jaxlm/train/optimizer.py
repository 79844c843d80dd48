"""Optax chains. Clipping is the step's: only it knows the global gradient norm.

Muon orthogonalizes every hidden matrix, which on a small model costs a third of a step: devices share that work
(sync/sharing.py). With ZeRO-1 gradients, states and parameters are a device's own parts of each: that is the same for
what works number by number; Muon and Adafactor, which look at whole matrices, bring these together.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxlm.config import OptimConfig
from jaxlm.sync.sharing import Sharing, alone
from jaxlm.sync.zero import Zero
from jaxlm.train.schedules import UNTOUCHED, LrHistory, Schedule, make_schedule


def is_matrix(params: Any) -> Any:
    """True for the weights of linear layers and embeddings; by name, since stacked layers add a dimension."""
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key in ("kernel", "embedding"), params)


def _groups(params: Any) -> Any:
    """'muon' for the stacked matrices of the layers, 'table' for embeddings that are look-ups alone, else 'adamw'."""
    tied = "head" not in params

    def label(path: Any, _: Any) -> str:
        if path[0].key == "layers" and path[-1].key == "kernel":
            return "muon"
        return "table" if path[-1].key == "embedding" and not (tied and path[0].key == "embed") else "adamw"

    return jax.tree_util.tree_map_with_path(label, params)


# Five steps of Newton-Schulz, the coefficients of Jordan et al., https://kellerjordan.github.io/posts/muon
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)


def orthogonalize(x: jax.Array) -> jax.Array:
    """The nearest (semi-)orthogonal matrix, roughly: singular values between 0.7 and 1.2. `[..., in, out]`"""
    a, b, c = NEWTON_SCHULZ
    wide = x.shape[-2] <= x.shape[-1]
    x = x if wide else jnp.swapaxes(x, -1, -2)
    x = x / (jnp.linalg.norm(x, axis=(-2, -1), keepdims=True) + 1e-8)
    for _ in range(5):
        gram = x @ jnp.swapaxes(x, -1, -2)
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x if wide else jnp.swapaxes(x, -1, -2)


def _orthogonalized(sharing: Sharing) -> optax.GradientTransformation:
    """Orthogonal updates of the size that suits their shape, sqrt(max(1, out / in)), from momenta `[L, in, out]`."""

    def act(x_LIO: jax.Array) -> jax.Array:
        return orthogonalize(x_LIO) * math.sqrt(max(1, x_LIO.shape[-1] / x_LIO.shape[-2]))

    def update(updates: Any, params: Any) -> Any:
        return jax.tree_util.tree_map_with_path(lambda path, x: sharing.on_layers(path, x, act), updates)

    return optax.stateless(update)


def _muon(c: OptimConfig, steps: int, sharing: Sharing, history: LrHistory) -> optax.GradientTransformation:
    """Jordan et al., https://kellerjordan.github.io/posts/muon, with Nesterov momentum; AdamW for the rest."""
    adam_rate, embed_rate = (make_schedule(c, steps, key, history) for key in ("adam_lr", "embed_lr"))
    muon = optax.chain(
        optax.trace(c.momentum, nesterov=True),
        _orthogonalized(sharing),
        optax.add_decayed_weights(c.weight_decay),
        optax.scale_by_learning_rate(make_schedule(c, steps, "lr", history)),
    )

    def table_rate(path: Any) -> Schedule:
        # Most rows of a token table have a gradient in few steps; those of a position table have one in every step.
        return adam_rate if path[0].key == "positions" else embed_rate

    def adamw(rate_of: Callable[[Any], Schedule]) -> optax.GradientTransformation:
        return optax.chain(optax.scale_by_adam(c.b1, c.b2, c.eps), _scale_by_rates(rate_of))

    return optax.partition({"muon": muon, "table": adamw(table_rate), "adamw": adamw(lambda path: adam_rate)}, _groups)


def _scale_by_rates(rate_of: Callable[[Any], Schedule]) -> optax.GradientTransformation:
    """optax.scale_by_learning_rate with a schedule for each path, and the same state."""

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        updates = jax.tree_util.tree_map_with_path(lambda path, x: -rate_of(path)(state.count) * x, updates)
        return updates, optax.ScaleByScheduleState(optax.safe_increment(state.count))

    return optax.GradientTransformation(lambda params: optax.ScaleByScheduleState(jnp.zeros((), jnp.int32)), update)


def _clip_rms(path: Any, x: jax.Array) -> jax.Array:
    """Scaled down to a root mean square of at most 1: that of each layer, where layers are stacked."""
    own = tuple(range(int(path[0].key == "layers"), x.ndim))
    return x / jnp.maximum(1, jnp.sqrt(jnp.mean(jnp.square(x), axis=own, keepdims=True)))


def _on_whole(inner: optax.GradientTransformation, zero: Zero) -> optax.GradientTransformation:
    """`inner` given whole gradients and its whole state, of parts; for states that are small."""

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        like = jax.eval_shape(inner.init, zero.params)
        grads = zero.whole(updates)
        updates, state = inner.update(grads, zero.whole(state, like), grads)  # of parameters only the shapes are read
        return zero.own(updates), zero.own(state)

    return optax.GradientTransformation(inner.init, update)


def make_optimizer(
    c: OptimConfig, steps: int, sharing: Sharing | None = None, history: LrHistory = UNTOUCHED
) -> optax.GradientTransformation:
    """The optax chain of a configuration, from averaged (and clipped) gradients to updates.

    With `sharing`, its update must run in a step mapped over that axis; the numbers are the same without. `init` is
    given whole parameters and gives the whole state.
    """
    schedule, sharing = make_schedule(c, steps, "lr", history), sharing or alone()
    if c.name == "muon":
        return _muon(c, steps, sharing, history)
    # Shazeer and Stern, Adafactor, with their constants.
    adafactor = optax.chain(
        optax.scale_by_factored_rms(decay_rate=0.8, epsilon=1e-30),
        optax.stateless(lambda updates, params: jax.tree_util.tree_map_with_path(_clip_rms, updates)),
    )
    scale = {
        "adamw": lambda: optax.scale_by_adam(c.b1, c.b2, c.eps),
        "lion": lambda: optax.scale_by_lion(c.b1, c.b2),
        "adafactor": lambda: adafactor if sharing.zero is None else _on_whole(adafactor, sharing.zero),
        "sgd": lambda: optax.trace(c.momentum, nesterov=True),
    }[c.name]()
    return optax.chain(
        scale, optax.add_decayed_weights(c.weight_decay, mask=is_matrix), optax.scale_by_learning_rate(schedule)
    )
