"""Learning-rate schedules and optax chains. Clipping is the step's: only it knows the global gradient norm.

Muon orthogonalizes every hidden matrix, which on a small model costs a third of a step. The devices of a host share
that work: each takes its part of the layers, and an all-gather, in memory or over NVLink, gives the updates to all.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxlm.config import OptimConfig

Schedule = Callable[[Any], Any]  # updates done -> learning rate


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


class Sharing(NamedTuple):
    """The devices of a host, which share work that is the same for all."""

    axis: str  # of the mapped step
    size: int  # devices of a host
    groups: list[list[int]] | None  # their indices on the axis, host by host; None where there is one host


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


def _orthogonalized(sharing: Sharing | None) -> optax.GradientTransformation:
    """Orthogonal updates of the size that suits their shape, sqrt(max(1, out / in)), from momenta `[L, in, out]`."""

    def one(x_LIO: jax.Array) -> jax.Array:
        num_layers = x_LIO.shape[0]
        if sharing is None or sharing.size == 1:
            o_LIO = orthogonalize(x_LIO)
        else:
            each = -(-num_layers // sharing.size)  # the last devices may get empty (zero) matrices
            padded = jnp.pad(x_LIO, ((0, each * sharing.size - num_layers), (0, 0), (0, 0)))
            first = jax.lax.axis_index(sharing.axis) % sharing.size * each
            mine = orthogonalize(jax.lax.dynamic_slice_in_dim(padded, first, each))
            o_LIO = jax.lax.all_gather(mine, sharing.axis, axis_index_groups=sharing.groups, tiled=True)[:num_layers]
        return o_LIO * math.sqrt(max(1, x_LIO.shape[-1] / x_LIO.shape[-2]))

    return optax.stateless(lambda updates, params: jax.tree.map(one, updates))


def _muon(c: OptimConfig, steps: int, sharing: Sharing | None) -> optax.GradientTransformation:
    """Jordan et al., https://kellerjordan.github.io/posts/muon, with Nesterov momentum; AdamW for the rest."""
    muon = optax.chain(
        optax.trace(c.momentum, nesterov=True),
        _orthogonalized(sharing),
        optax.add_decayed_weights(c.weight_decay),
        optax.scale_by_learning_rate(make_schedule(c, steps)),
    )

    def adamw(lr: float) -> optax.GradientTransformation:
        return optax.chain(
            optax.scale_by_adam(c.b1, c.b2, c.eps), optax.scale_by_learning_rate(make_schedule(c, steps, lr))
        )

    return optax.partition({"muon": muon, "table": adamw(c.embed_lr or c.adam_lr), "adamw": adamw(c.adam_lr)}, _groups)


def _clip_rms(path: Any, x: jax.Array) -> jax.Array:
    """Scaled down to a root mean square of at most 1: that of each layer, where layers are stacked."""
    own = tuple(range(int(path[0].key == "layers"), x.ndim))
    return x / jnp.maximum(1, jnp.sqrt(jnp.mean(jnp.square(x), axis=own, keepdims=True)))


def make_optimizer(c: OptimConfig, steps: int, sharing: Sharing | None = None) -> optax.GradientTransformation:
    """The optax chain of a configuration, from averaged (and clipped) gradients to updates.

    With `sharing`, its update must run in a step mapped over that axis; the numbers are the same without.
    """
    schedule = make_schedule(c, steps)
    if c.name == "muon":
        return _muon(c, steps, sharing)
    scale = {
        "adamw": lambda: optax.scale_by_adam(c.b1, c.b2, c.eps),
        "lion": lambda: optax.scale_by_lion(c.b1, c.b2),
        "adafactor": lambda: optax.chain(
            # Shazeer and Stern, Adafactor, with their constants.
            optax.scale_by_factored_rms(decay_rate=0.8, epsilon=1e-30),
            optax.stateless(lambda updates, params: jax.tree_util.tree_map_with_path(_clip_rms, updates)),
        ),
        "sgd": lambda: optax.trace(c.momentum, nesterov=True),
    }[c.name]()
    return optax.chain(
        scale, optax.add_decayed_weights(c.weight_decay, mask=is_matrix), optax.scale_by_learning_rate(schedule)
    )
