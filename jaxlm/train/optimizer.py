"""Optax chains, one for each optimizer. Clipping belongs to the step, which alone knows the global gradient norm.

With ZeRO, a device holds its own part of gradients, optimizer state and parameters. Elementwise optimizers need no
more. Muon and Adafactor look at whole matrices, and gather them.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxlm.config import STACKS, OptimConfig
from jaxlm.model import lora
from jaxlm.sync.sharing import LayerSharing, alone
from jaxlm.train.muon import muon
from jaxlm.train.schedules import UNTOUCHED, LrHistory, make_schedule


def is_matrix(path: Any) -> bool:
    """Whether the parameter at this path is the weight of a linear layer or an embedding; by name, since stacked layers
    add a dimension.
    """
    return path[-1].key in ("kernel", "embedding", lora.A, lora.B)


def matrix_mask(params: Any) -> Any:
    return jax.tree_util.tree_map_with_path(lambda path, _: is_matrix(path), params)


def _clip_rms(path: Any, x: jax.Array) -> jax.Array:
    """Scales each array, or each layer of a stacked one, down to a root mean square of at most 1."""
    own = tuple(range(int(path[0].key in STACKS), x.ndim))
    return x / jnp.maximum(1, jnp.sqrt(jnp.mean(jnp.square(x), axis=own, keepdims=True)))


def _on_whole(inner: optax.GradientTransformation, sharing: LayerSharing) -> optax.GradientTransformation:
    """Applies `inner` to whole gradients, gathered from the parts, and its whole state; for small states, which tensor
    groups do not divide.
    """
    zero = sharing.zero

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        grads = sharing.whole(updates)
        if zero:
            state = zero.whole(state, jax.eval_shape(inner.init, grads))
        # In place of parameters, gradients: `inner` reads only their shapes.
        updates, state = inner.update(grads, state, grads)
        return sharing.own(updates), zero.own(state) if zero else state

    return optax.GradientTransformation(inner.init, update)


def _decayed(
    scale: optax.GradientTransformation, c: OptimConfig, steps: int, history: LrHistory
) -> optax.GradientTransformation:
    """`scale`, then decoupled weight decay on matrices, then the learning rate."""
    return optax.chain(
        scale,
        optax.add_decayed_weights(c.weight_decay, mask=matrix_mask),
        optax.scale_by_learning_rate(make_schedule(c, steps, "lr", history)),
    )


def _adamw(c: OptimConfig, steps: int, sharing: LayerSharing, history: LrHistory) -> optax.GradientTransformation:
    """Loshchilov and Hutter, Decoupled Weight Decay Regularization."""
    return _decayed(optax.scale_by_adam(c.b1, c.b2, c.eps), c, steps, history)


def _lion(c: OptimConfig, steps: int, sharing: LayerSharing, history: LrHistory) -> optax.GradientTransformation:
    """Chen et al., Symbolic Discovery of Optimization Algorithms."""
    return _decayed(optax.scale_by_lion(c.b1, c.b2), c, steps, history)


def _adafactor(c: OptimConfig, steps: int, sharing: LayerSharing, history: LrHistory) -> optax.GradientTransformation:
    """Shazeer and Stern, Adafactor, with their constants."""
    scale = optax.chain(
        optax.scale_by_factored_rms(decay_rate=0.8, epsilon=1e-30),
        optax.stateless(lambda updates, params: jax.tree_util.tree_map_with_path(_clip_rms, updates)),
    )
    return _decayed(_on_whole(scale, sharing) if sharing.in_parts else scale, c, steps, history)


def _sgd(c: OptimConfig, steps: int, sharing: LayerSharing, history: LrHistory) -> optax.GradientTransformation:
    return _decayed(optax.trace(c.momentum, nesterov=True), c, steps, history)


OF_WHOLE_MATRICES = ("adafactor",)  # whose state tensor groups do not divide
OPTIMIZERS: dict[str, Callable[[OptimConfig, int, LayerSharing, LrHistory], optax.GradientTransformation]] = {
    "adamw": _adamw,
    "adafactor": _adafactor,
    "lion": _lion,
    "muon": muon,
    "sgd": _sgd,
}


def make_optimizer(
    c: OptimConfig, steps: int, sharing: LayerSharing | None = None, history: LrHistory = UNTOUCHED
) -> optax.GradientTransformation:
    """Returns the optax chain that `optim.name` names, from averaged and clipped gradients to updates.

    `init` takes whole parameters and returns the whole state. With `sharing`, `update` must run inside the mapped step;
    the results are the same without it.
    """
    return OPTIMIZERS[c.name](c, steps, sharing or alone(), history)
