"""The forward and backward pass of one device, and the mean of its gradient over the devices.

Shapes: B sequences of this device, T time, N = B * T.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxlm.config import STACKS, Config
from jaxlm.model import Model, Params
from jaxlm.model.cross_attention import Prompts
from jaxlm.model.losses import LossSums, output_loss
from jaxlm.sync import GradSync, overlap
from jaxlm.sync.zero import Zero
from jaxlm.train import loss_scale, pipeline, trained
from jaxlm.train.accumulation import accumulate, accumulate_overlapped, accumulate_parts, converted, fixed_to
from jaxlm.train.one_device import Batch, OneDevice


class Sums(NamedTuple):
    """Sums over this device's tokens."""

    losses: LossSums
    squares_L: jax.Array | None  # of the squares of each layer's output, with log.layer_stats


Loss = Callable[..., tuple[jax.Array, Sums]]  # (params, batch, dropout_keys, on_layer=None) -> (loss, sums)
# (trained params, frozen ones, micro-batches [count, ...], mean number of targets of a device, state of the reduction)
# -> (gradient of the mean loss of the global batch, or with ZeRO this device's parts of it; sums; new state of the
# reduction). With ZeRO-3, parameters are the parts that this device holds.
Gradients = Callable[[Params, Params, Any, jax.Array, Any], tuple[Params, Sums, Any]]


def batch_shapes(config: Config, *leading: int) -> dict[str, jax.ShapeDtypeStruct]:
    """The shapes of a batch of training, `[*leading, T]`, and of its prompts, `[*leading, S]`."""
    names = ["inputs", "targets"] + ["positions"] * (config.data.packing == "document")
    prompts = ["prompts", "prompt_positions"] * (config.model.encoder_layers > 0)
    lengths = dict.fromkeys(names, config.seq_len) | dict.fromkeys(prompts, config.model.encoder_len)
    return {name: jax.ShapeDtypeStruct((*leading, length), jnp.int32) for name, length in lengths.items()}


def loss_sums(
    config: Config,
    model: Model,
    params: Params,
    batch: Batch,
    dropout_keys: jax.Array | None = None,
    on_layer: Callable | None = None,
    scale: jax.Array | float = 1.0,
    frozen: Params | None = None,
    sync: GradSync | None = None,
) -> LossSums:
    """The forward pass: sums of the losses over the targets of a batch; the objective is multiplied by `scale`.

    Args:
      on_layer: applied to a layer's `params` when the layer uses them.
      frozen: the parameters that are not in `params`.
      sync: gathers `frozen`, if devices hold it in parts.
    """
    return all_sums(config, model, params, batch, dropout_keys, on_layer, scale, frozen, sync).losses


def all_sums(
    config: Config,
    model: Model,
    params: Params,
    batch: Batch,
    dropout_keys: jax.Array | None,
    on_layer: Callable | None,
    scale: jax.Array | float,
    frozen: Params | None,
    sync: GradSync | None,
    layer_stats: bool = False,
) -> Sums:
    """`loss_sums`, and with `layer_stats` the sums of the squares of the layers' outputs."""
    if frozen:
        params, on_layer, batch = with_frozen(params, frozen, on_layer, sync, batch)
    inputs, squares_L = (params, batch["inputs"], dropout_keys, batch.get("positions"), prompts_of(batch)), None
    if layer_stats:
        x_ND, squares_L = model.hidden_and_squares(*inputs, on_layer=on_layer)
    else:
        x_ND = model.hidden(*inputs, on_layer=on_layer)
    weights, targets_N = model.output_params(params), batch["targets"].reshape(-1)
    vocabulary = model.tensor, model.vocab_size
    return Sums(output_loss(model.unembed, weights, x_ND, targets_N, config.loss, scale, *vocabulary), squares_L)


def prompts_of(batch: Batch) -> Prompts | None:
    return Prompts(batch["prompts"], batch["prompt_positions"]) if "prompts" in batch else None


def product_dtype(config: Config) -> str:
    """The dtype to which matrices are converted once, before they are gathered or used in several micro-batches.

    With float16, parameters and gradients are multiplied by factors of the loss scale, in float32.
    """
    return "float32" if config.model.dtype == "float16" else config.model.dtype


def gathered_bytes(config: Config, zero: Zero, params: Params) -> float:
    """Bytes that a device sends in a step so that parameters of these shapes are whole where they are needed: with
    ZeRO-1 and 2 after the update; with ZeRO-3 in each micro-batch, the layers in both passes.
    """
    own = trained.part(config, params)
    masters = jax.eval_shape(lambda tree: jax.tree.map(lambda x: x.astype(jnp.float32), tree), own)
    if config.parallel.zero < 3:
        return zero.sent_bytes(masters) if config.parallel.zero else 0.0

    def held(masters: Params, frozen: Params) -> tuple[Params, Params]:
        return converted(masters, product_dtype(config), True), converted(frozen, config.model.dtype, True)

    trees = jax.eval_shape(held, masters, trained.without(params, own))
    times = {key: config.optim.accum_steps * (1 + (key in STACKS)) for key in params}
    return sum(times[key] * zero.sent_bytes({key: x}) for tree in trees for key, x in tree.items())


def make_gradients(config: Config, own: OneDevice) -> Gradients:
    """Returns the function that computes the gradient of one device and averages it over the devices."""
    model, sync, everyone = own.model, own.sync, own.grid.everyone
    matrices = product_dtype(config)

    def held(params: Params) -> Params:
        """What the loss of a micro-batch starts from; matrices are converted once, and before they are gathered."""
        return converted(params, matrices, outer=sync.gather is not None)

    def forward(
        params: Params,
        batch: Batch,
        dropout_keys: jax.Array | None,
        on_layer: Callable | None = None,
        *,
        scale: jax.Array,
        frozen: Params,
    ) -> tuple[jax.Array, Sums]:
        stats = config.log.layer_stats
        sums = all_sums(config, model, params, batch, dropout_keys, on_layer, scale, frozen, sync, stats)
        return sums.losses.objective, sums

    def averaged(
        loss: Loss, params: Params, micro: Any, mean_targets: jax.Array, sync_state: Any
    ) -> tuple[Params, Sums, Any]:
        if config.parallel.zero >= 2:
            return accumulate_parts(loss, held(params), micro, sync, sync_state)
        if config.parallel.overlap:
            return accumulate_overlapped(loss, params, micro, matrices, sync, sync_state, always=mean_targets > 0)
        grads, sums = accumulate(loss, params, micro, matrices)
        grads, sync_state = sync.reduce(grads, sync_state)
        return grads, sums, sync_state

    def gradients(
        params: Params, frozen: Params, micro: Any, mean_targets: jax.Array, sync_state: Any
    ) -> tuple[Params, Sums, Any]:
        def loss(params: Params, *inputs: Any) -> tuple[jax.Array, Sums]:
            return forward(params, *inputs, scale=1 / mean_targets, frozen=frozen)

        return averaged(loss, params, micro, mean_targets, sync_state)

    def in_float16(
        params: Params, frozen: Params, micro: Any, mean_targets: jax.Array, sync_state: Any
    ) -> tuple[Params, Sums, Any]:
        """Differentiates the scaled sum, and divides by the scale and the number of targets in float32."""

        def scaled(scale: jax.Array) -> tuple[Params, Sums, Any]:
            def loss(
                params: Params, batch: Batch, dropout_keys: jax.Array | None, on_layer: Callable | None = None
            ) -> tuple[jax.Array, Sums]:
                params, on_layer = loss_scale.unscaled(params, on_layer, 1 / (scale * mean_targets))
                return forward(params, batch, dropout_keys, on_layer, scale=scale, frozen=frozen)

            return averaged(loss, params, micro, mean_targets, sync_state)

        def finite(found: tuple[Params, Sums, Any]) -> jax.Array:
            """Ends the search for a scale: the gradient is finite, or the loss is not, and no scale helps."""
            norm, nll = everyone.mean(jnp.stack([sync.global_norm(found[0]), found[1].losses.nll]))
            return jnp.isfinite(norm) | ~jnp.isfinite(nll)

        return loss_scale.until_finite(scaled, finite, loss_scale.first_scale(micro[0]["inputs"][0].size))

    def in_pipeline(
        params: Params, frozen: Params, micro: Any, mean_targets: jax.Array, sync_state: Any
    ) -> tuple[Params, Sums, Any]:
        grads, sums = pipeline.gradients(config, own, converted(params, matrices), frozen, micro, 1 / mean_targets)
        grads, sync_state = sync.reduce(grads, sync_state)
        return grads, Sums(sums, None), sync_state

    def with_low_frozen(
        params: Params, frozen: Params, micro: Any, mean_targets: jax.Array, sync_state: Any
    ) -> tuple[Params, Sums, Any]:
        if config.optim.accum_steps > 1 or sync.gather:  # converted once, and before they are gathered
            frozen = converted(frozen, config.model.dtype, outer=sync.gather is not None)
        if sync.mixes and config.parallel.of_a_replica > 1:  # the model's collectives wait for that of the step
            batch, keys = micro
            micro = batch | {"inputs": overlap.after(batch["inputs"], mean_targets)}, keys
        compute = in_float16 if config.model.dtype == "float16" else gradients
        if config.parallel.pipeline > 1:
            compute = in_pipeline
        return compute(params, frozen, micro, mean_targets, sync_state)

    return with_low_frozen


def with_frozen(
    params: Params, frozen: Params, on_layer: Callable | None, sync: GradSync | None, batch: Batch
) -> tuple[Params, Callable | None, Batch]:
    """Returns trained and frozen parameters as one tree, an `on_layer` that acts only on a layer's trained ones, and
    the batch. If devices hold parts, frozen parameters are gathered, those of a layer by `on_layer`.
    """
    gather = sync.gather if sync else None

    def on_each(layer: Params, stack: str) -> Params:
        own, others = (act(layer, params[stack]) for act in (trained.within, trained.without))
        others = gather(stack, others) if gather else others
        return trained.joined(others, on_layer(own, stack) if on_layer else own)

    if sync is None or gather is None:
        return trained.joined(frozen, params), on_each if on_layer else None, batch
    frozen, batch = fixed_to(frozen, batch)
    outer = {key: gather(key, x) for key, x in frozen.items() if key not in STACKS}
    both = trained.joined(frozen | outer, params)
    for stack in [key for key in STACKS if key in params] if sync.mixes else ():
        slots = {key: x for key, x in both[stack].items() if key == overlap.SLOTS}
        held = {key: x for key, x in both[stack].items() if key != overlap.SLOTS}
        both[stack] = overlap.after(held, outer) | slots
    return both, on_each, batch


def make_eval_sums(config: Config, own: OneDevice) -> Callable[[Params, Batch], LossSums]:
    """Returns (what this device holds of the parameters, its part of a batch) -> sums of its losses."""

    model, sync = own.model, own.sync

    def sums(params: Params, batch: Batch) -> LossSums:
        if config.parallel.pipeline > 1:
            return pipeline.losses(config, own, params, batch)
        if sync.gather is None:
            return loss_sums(config, model, params, batch)
        params = converted(params, config.model.dtype, outer=True)
        stacks = {key: {} for key in params if key in STACKS}
        return loss_sums(config, model, stacks, batch, frozen=params, sync=sync)

    return sums
