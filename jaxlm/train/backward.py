"""The forward and backward pass of one device, and the mean of its gradient over the devices.

Shapes: B sequences of this device, T time, N = B * T.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxlm.config import Config
from jaxlm.model import Model, Params
from jaxlm.model.losses import LossSums, output_loss
from jaxlm.sync import GradSync, Group, overlap
from jaxlm.train import loss_scale

# inputs, targets (-1 does not count) and, with packed documents, positions: int32 [B, T]. With several processes also
# stop, float32 [1]: 1 if this process was asked to stop.
Batch = dict[str, jax.Array]
Loss = Callable[..., tuple[jax.Array, LossSums]]  # (params, batch, dropout_keys, on_layer=None) -> (loss, sums)
# (params, micro-batches [count, ...], mean number of targets of a device, state of the reduction) -> (gradient of the
# mean loss of the global batch, or with ZeRO this device's parts of it; sums of this device's losses; new state of the
# reduction)
Gradients = Callable[[Params, Any, jax.Array, Any], tuple[Params, LossSums, Any]]


def loss_sums(
    config: Config,
    model: Model,
    params: Params,
    batch: Batch,
    dropout_keys: jax.Array | None = None,
    on_layer: Callable | None = None,
) -> LossSums:
    """The forward pass: sums of the losses over the targets of a batch."""
    x_ND = model.hidden(params, batch["inputs"], dropout_keys, batch.get("positions"), on_layer)
    return output_loss(lambda x: model.unembed(params, x), x_ND, batch["targets"].reshape(-1), config.loss)


def make_gradients(config: Config, model: Model, sync: GradSync, group: Group) -> Gradients:
    """Returns the function that computes the gradient of one device and averages it over the devices."""

    def averaged(loss: Loss, params: Params, micro: Any, sync_state: Any) -> tuple[Params, LossSums, Any]:
        if config.parallel.overlap:
            return accumulate_overlapped(loss, params, micro, sync, sync_state)
        grads, sums = accumulate(loss, params, micro)
        grads, sync_state = sync.reduce(grads, sync_state)
        return grads, sums, sync_state

    def gradients(params: Params, micro: Any, mean_targets: jax.Array, sync_state: Any) -> tuple[Params, LossSums, Any]:
        def loss(params: Params, *inputs: Any) -> tuple[jax.Array, LossSums]:
            sums = loss_sums(config, model, params, *inputs)
            return sums.objective / mean_targets, sums

        return averaged(loss, params, micro, sync_state)

    def in_float16(
        params: Params, micro: Any, mean_targets: jax.Array, sync_state: Any
    ) -> tuple[Params, LossSums, Any]:
        """Differentiates the scaled sum, and divides by the scale and the number of targets in float32."""

        def scaled(scale: jax.Array) -> tuple[Params, LossSums, Any]:
            def loss(
                params: Params, batch: Batch, dropout_keys: jax.Array | None, on_layer: Callable | None = None
            ) -> tuple[jax.Array, LossSums]:
                params, on_layer = loss_scale.unscaled(params, on_layer, 1 / (scale * mean_targets))
                sums = loss_sums(config, model, params, batch, dropout_keys, on_layer)
                return sums.objective * scale, sums

            return averaged(loss, params, micro, sync_state)

        def finite(found: tuple[Params, LossSums, Any]) -> jax.Array:
            """Ends the search for a scale: the gradient is finite, or the loss is not, and no scale helps."""
            norm, nll = group.mean(jnp.stack([sync.global_norm(found[0]), found[1].nll]))
            return jnp.isfinite(norm) | ~jnp.isfinite(nll)

        return loss_scale.until_finite(scaled, finite, loss_scale.first_scale(micro[0]["inputs"][0].size))

    return in_float16 if config.model.dtype == "float16" else gradients


def micro_batches(tree: Any, count: int) -> Any:
    """[B, ...] -> [count, B / count, ...]"""
    return jax.tree.map(lambda x: x.reshape(count, x.shape[0] // count, *x.shape[1:]), tree)


def accumulate(loss: Callable, params: Params, micro: Any) -> tuple[Params, LossSums]:
    """Adds up gradient and sums of `loss` over micro-batches `[count, ...]`, in float32, one micro-batch at a time.

    It averages nothing, so the result does not depend on their number.
    """
    grad = jax.grad(loss, has_aux=True)
    first = jax.tree.map(lambda x: x[0], micro)
    if len(jax.tree.leaves(micro)[0]) == 1:
        return grad(params, *first)

    def add(total: Any, part: Any) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, grad(params, *part)), None

    shapes = jax.eval_shape(grad, params, *first)
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    return jax.lax.scan(add, zeros, micro)[0]


def accumulate_overlapped(
    loss: Callable, params: Params, micro: Any, sync: GradSync, sync_state: Any
) -> tuple[Params, LossSums, Any]:
    """`accumulate`, with the reduction over the devices during the backward pass of the last micro-batch."""
    before, sums = None, None
    if len(jax.tree.leaves(micro)[0]) > 1:
        before, sums = accumulate(loss, params, jax.tree.map(lambda x: x[:-1], micro))
    last = jax.tree.map(lambda x: x[-1], micro)
    grads, sync_state, last_sums = overlap.gradients(
        lambda params, on_layer: loss(params, *last, on_layer), params, before, sync, sync_state
    )
    return grads, last_sums if sums is None else jax.tree.map(jnp.add, sums, last_sums), sync_state
