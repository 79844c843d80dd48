"""One optimizer step, written for one device and run on all under `jax.pmap`.

The state is replicated (`in_axes=None`): its arrays have their natural shapes, without a leading device axis. Only what
a strategy keeps per device has one. Shapes: B sequences of this device, T time, N = B * T.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxlm.config import Config
from jaxlm.host import runtime, together
from jaxlm.model import Model, Params
from jaxlm.model.losses import LossSums, output_loss
from jaxlm.sync import GradSync, Group, make_sync, overlap, sharing, zero
from jaxlm.train import guard, loss_mean, loss_scale
from jaxlm.train.optimizer import make_optimizer
from jaxlm.train.schedules import UNTOUCHED, LrHistory, make_schedule

AXIS = "devices"
NO_TARGETS = 1e-9  # in place of a mean number of targets of zero; the sums over them are zero

Device = Any  # jax.Device, which type checkers take for a variable
# inputs, targets (-1: nothing is predicted) and, with packed documents, positions: int32 [B, T]. With several processes
# also stop, float32 [1]: 1 if this process was asked to stop.
Batch = dict[str, jax.Array]


class TrainState(NamedTuple):
    step: jax.Array  # optimizer updates done, int32
    params: Params
    opt_state: optax.OptState
    ema: Params | None  # moving average of params, where optim.ema_decay is set
    sync: Any  # of the gradient-synchronization strategy, [devices, ...]
    guard: guard.Guard  # what was usual in the last steps, and how many were skipped
    loss_mean: loss_mean.LossMean  # of the steps since the last training line


def state_axes(config: Config) -> TrainState:
    """Per-field pmap axes: None = replicated, 0 = one slice for each device."""
    axes: dict[str, Any] = dict.fromkeys(TrainState._fields) | {"sync": 0}
    if config.parallel.zero:
        axes["opt_state"] = 0
    return TrainState(**axes)


def init_params(config: Config, model: Model) -> Params:
    """Initial parameters, determined by the seed."""
    return jax.jit(model.init)(jax.random.key(config.seed))  # without jit, each operation would be compiled by itself


def init_rest(config: Config, params: Params, num_devices: int) -> TrainState:
    """The initial state without its parameters."""
    opt_state = make_optimizer(config.optim, config.steps).init(float32(params))
    sync = make_sync(config.parallel, Group(AXIS, num_devices), params).init(params)
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=None,
        opt_state=zero.spread(opt_state, num_devices) if config.parallel.zero else opt_state,
        ema=jax.tree.map(jnp.copy, float32(params)) if config.optim.ema_decay else None,
        sync=jax.tree.map(lambda x: jnp.broadcast_to(x, (num_devices, *x.shape)), sync),
        guard=guard.init(),
        loss_mean=loss_mean.init(),
    )


def init_state(config: Config, model: Model, num_devices: int) -> TrainState:
    params = init_params(config, model)
    return init_rest(config, params, num_devices)._replace(params=params)


def make_train_step(
    config: Config, model: Model, devices: list[Device], history: LrHistory = UNTOUCHED
) -> Callable[[TrainState, Batch], tuple[TrainState, dict[str, Any]]]:
    """The step of one device: (state, this device's part of the batch) -> (state, metrics of the global batch)."""
    params_like = jax.eval_shape(model.init, jax.random.key(0))
    group = Group(AXIS, len(devices))
    sync = make_sync(config.parallel, group, params_like)
    optimizer = make_optimizer(config.optim, config.steps, sharing_of(config, devices, group, params_like), history)
    schedule = make_schedule(config.optim, config.steps, "lr", history)
    gradients = make_gradients(config, model, sync, group)

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, Any]]:
        batch, stop = dict(batch), batch.get("stop")
        batch.pop("stop", None)
        # Devices may hold different numbers of targets. Dividing each device's sum by the mean number, before the mean
        # over devices, gives every target of the global batch the same weight. Without targets the gradient is zero.
        targets = jnp.sum(batch["targets"] >= 0, dtype=jnp.float32)
        targets = jnp.maximum(group.mean(targets), NO_TARGETS)

        keys = _dropout_keys(config, state.step, batch["inputs"].shape[0])
        masters = float32(state.params)  # whatever dtype they are stored in
        micro = micro_batches((batch, keys), config.optim.accum_steps)
        grads, sums, sync_state = gradients(masters, micro, targets, state.sync)

        numbers = guard.agree(state.guard, sums.nll, sync.global_norm(grads), group)
        good, scale, guarded = guard.judge(state.guard, numbers, targets, config.optim, model.vocab_size)
        if config.optim.clip_norm:
            scale = jnp.minimum(scale, config.optim.clip_norm / jnp.maximum(numbers.norm, 1e-9))
        grads = jax.tree.map(lambda g: g * scale, grads)
        own = sync.own(masters)  # what this device updates: all parameters, or its parts
        updates, opt_state = optimizer.update(grads, state.opt_state, own)
        masters = sync.whole(optax.apply_updates(own, updates))

        metrics = {"loss": numbers.nll / targets, "lr": schedule(state.step), "grad_norm": numbers.norm}
        known = jnp.where(targets > NO_TARGETS, metrics["loss"], jnp.nan)
        metrics["loss_mean"], kept_mean = loss_mean.push(state.loss_mean, known, state.step + 1, config)
        metrics |= {key: getattr(guarded, key) for key in ("skipped", "spikes", "in_row", "high")}
        if stop is not None:  # whether any process was asked to stop: all learn it at the same step
            metrics["stop"] = group.mean(stop)
        ema = update_ema(state.ema, masters, state.step, config.optim.ema_decay)
        params = stored(masters, config.model.param_dtype, jax.random.fold_in(jax.random.key(config.seed), state.step))
        new, old = (params, opt_state, ema, sync_state), (state.params, state.opt_state, state.ema, state.sync)
        params, opt_state, ema, sync_state = guard.either(good, new, old)
        return TrainState(state.step + 1, params, opt_state, ema, sync_state, guarded, kept_mean), metrics

    return train_step


def make_gradients(config: Config, model: Model, sync: GradSync, group: Group) -> Callable:
    """A function that computes the gradient of one device and averages it over the devices.

    Returns:
      (parameters, micro-batches [steps, ...], mean number of targets of a device, state of the reduction) -> (gradient
      of the mean loss of the global batch, sums of this device's losses, new state of the reduction).
    """

    def gradients(
        params: Params, micro: Any, targets: jax.Array, sync_state: Any, scale: jax.Array | None = None
    ) -> tuple[Params, LossSums, Any]:
        """With a scale, differentiates the scaled sum, and divides by the scale and the targets in float32."""

        def loss(
            params: Params, batch: Batch, dropout_keys: jax.Array | None, on_layer: Callable | None = None
        ) -> tuple[jax.Array, LossSums]:
            if scale is not None:
                params, on_layer = loss_scale.unscaled(params, on_layer, 1 / (scale * targets))
            x_ND = model.hidden(params, batch["inputs"], dropout_keys, batch.get("positions"), on_layer)
            sums = output_loss(lambda x: model.unembed(params, x), x_ND, batch["targets"].reshape(-1), config.loss)
            return (sums.objective / targets if scale is None else sums.objective * scale), sums

        if config.parallel.overlap:
            return accumulate_overlapped(loss, params, micro, sync, sync_state)
        grads, sums = accumulate(loss, params, micro)
        grads, sync_state = sync.reduce(grads, sync_state)
        return grads, sums, sync_state

    def in_float16(params: Params, micro: Any, targets: jax.Array, sync_state: Any) -> tuple[Params, LossSums, Any]:
        def finite(found: tuple[Params, LossSums, Any]) -> jax.Array:
            """Whether no gradient overflowed, the same on all devices. No scale helps if the loss itself did."""
            norm, nll = group.mean(jnp.stack([sync.global_norm(found[0]), found[1].nll]))
            return jnp.isfinite(norm) | ~jnp.isfinite(nll)

        first = loss_scale.first_scale(micro[0]["inputs"][0].size)
        return loss_scale.until_finite(
            lambda scale: gradients(params, micro, targets, sync_state, scale), finite, first
        )

    return in_float16 if config.model.dtype == "float16" else gradients


def sharing_of(config: Config, devices: list[Device], group: Group, params: Params) -> sharing.LayerSharing:
    """How devices share the optimizer's work: all of them with ZeRO, else those of a host, which are neighbours."""
    if config.parallel.zero:
        return sharing.by_parts(zero.Zero(group, params))
    hosts = [d.process_index for d in devices]
    size = hosts.count(hosts[0])
    if size == 1:
        return sharing.alone()
    members = tuple(tuple(range(i, i + size)) for i in range(0, len(hosts), size))
    return sharing.by_host(Group(AXIS, size, members if len(members) > 1 else None))


def micro_batches(tree: Any, steps: int) -> Any:
    """[B, ...] -> [steps, B / steps, ...]"""
    return jax.tree.map(lambda x: x.reshape(steps, x.shape[0] // steps, *x.shape[1:]), tree)


def accumulate(loss: Callable, params: Params, micro: Any) -> tuple[Params, LossSums]:
    """Gradient and sums of `loss`, added up over micro-batches `[steps, ...]` in float32, one at a time.

    Nothing is averaged here, so the result does not depend on `steps`.
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
    """`accumulate`, and the reduction over the devices during the last micro-batch's backward pass."""
    before, sums = None, None
    if len(jax.tree.leaves(micro)[0]) > 1:
        before, sums = accumulate(loss, params, jax.tree.map(lambda x: x[:-1], micro))
    last = jax.tree.map(lambda x: x[-1], micro)
    grads, sync_state, last_sums = overlap.gradients(
        lambda params, on_layer: loss(params, *last, on_layer), params, before, sync, sync_state
    )
    return grads, last_sums if sums is None else jax.tree.map(jnp.add, sums, last_sums), sync_state


def float32(params: Params) -> Params:
    return jax.tree.map(lambda p: p.astype(jnp.float32), params)


def stored(params: Params, dtype: str, key: jax.Array) -> Params:
    """Parameters in the dtype in which they are stored, rounded stochastically if that is bfloat16.

    Most updates are smaller than half the distance between two bfloat16 numbers. Rounding up or down at random, with
    the probabilities that keep the mean, does not lose them (Gupta et al., Deep Learning with Limited Numerical
    Precision, 2015).
    """
    if dtype == "float32":
        return params

    def rounded(i: int, x: jax.Array) -> jax.Array:
        bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
        noise = jax.random.bits(jax.random.fold_in(key, i), x.shape, jnp.uint16)
        up = jax.lax.bitcast_convert_type((bits + noise) & jnp.uint32(0xFFFF0000), jnp.float32)
        return jnp.where(jnp.isfinite(x), up, x).astype(dtype)

    leaves, tree = jax.tree.flatten(params)
    return jax.tree.unflatten(tree, [rounded(i, x) for i, x in enumerate(leaves)])


def update_ema(ema: Params | None, params: Params, step: jax.Array, decay: float) -> Params | None:
    """ema <- d * ema + (1 - d) * params, with a smaller d in the first steps, to forget the initial parameters."""
    if ema is None:
        return None
    d = jnp.minimum(decay, (1 + step) / (10 + step))
    return jax.tree.map(lambda e, p: d * e + (1 - d) * p, ema, params)


def _dropout_keys(config: Config, step: jax.Array, batch: int) -> jax.Array | None:
    """A key for each sequence, from its place in the global batch, so that masks do not depend on the devices."""
    if not config.model.dropout:
        return None
    key = jax.random.fold_in(jax.random.key(config.seed + 1), step)
    rows_B = jax.lax.axis_index(AXIS) * batch + jnp.arange(batch)
    return jax.vmap(lambda row: jax.random.fold_in(key, row))(rows_B)


def make_eval_step(config: Config, model: Model) -> Callable[[Params, Batch], dict[str, jax.Array]]:
    """The evaluation of one device: (params, its part of the batch) -> sums over the global batch.

    The batch also has `bytes`, float32 [B, T]: the number of UTF-8 bytes that each target stands for.
    """

    def eval_step(params: Params, batch: Batch) -> dict[str, jax.Array]:
        x_ND = model.hidden(params, batch["inputs"], positions_BT=batch.get("positions"))
        sums = output_loss(lambda x: model.unembed(params, x), x_ND, batch["targets"].reshape(-1), config.loss)
        sums = sums._asdict() | {"bytes": jnp.sum(batch["bytes"])}
        if "stop" in batch:
            sums["stop"] = batch["stop"]
        return jax.lax.psum(sums, AXIS)

    return eval_step


def pmap_train_step(config: Config, step: Callable, devices: list[Device]) -> Callable:
    """The step on all devices: (state, batch [local devices, ...]) -> (state, metrics). It donates the state."""
    axes = state_axes(config)
    program = runtime.kept(
        jax.pmap(step, axis_name=AXIS, in_axes=(axes, 0), out_axes=(axes, None), donate_argnums=0, devices=devices)
    )
    return together.compiled(program, "training step")


def pmap_eval_step(step: Callable, devices: list[Device]) -> Callable:
    """The evaluation on all devices: (params, batch [local devices, ...]) -> sums over the global batch."""
    program = runtime.kept(jax.pmap(step, axis_name=AXIS, in_axes=(None, 0), out_axes=None, devices=devices))
    return together.compiled(program, "evaluation step")
