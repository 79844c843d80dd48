"""One optimizer step, written for one device and run on all under `jax.pmap`.

The state is replicated (`in_axes=None`): its arrays have their natural shapes, without a leading device axis. Only what
differs between devices has one. Shapes: B sequences of this device, T time.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxlm.config import Config
from jaxlm.host import runtime, together
from jaxlm.model import Model, Params
from jaxlm.sync import overlap, zero
from jaxlm.train import guard, layer_stats, loss_mean, trained
from jaxlm.train.accumulation import micro_batches
from jaxlm.train.backward import Batch, make_eval_sums, make_gradients
from jaxlm.train.one_device import AXIS, one_device, sharing_of
from jaxlm.train.optimizer import make_optimizer
from jaxlm.train.schedules import UNTOUCHED, LrHistory, make_schedule

NO_TARGETS = 1e-9  # the divisor if a batch has no targets; the sums that it divides are zero

Device = Any  # jax.Device, which type checkers take for a variable


class TrainState(NamedTuple):
    step: jax.Array  # optimizer updates done, int32
    params: Params
    opt_state: optax.OptState
    ema: Params | None  # moving average of the params that are trained, if optim.ema_decay is set
    sync: Any  # state of the reduction of gradients, [devices, ...]
    guard: guard.Guard  # statistics of recent gradient norms, and counts of bad steps
    loss_mean: loss_mean.LossMean  # over the steps since the last training line


def state_axes(config: Config) -> TrainState:
    """Per-field pmap axes: None = replicated, 0 = one slice for each device."""
    axes: dict[str, Any] = dict.fromkeys(TrainState._fields) | dict.fromkeys(("sync", *sharded_fields(config)), 0)
    return TrainState(**axes)


def sharded_fields(config: Config) -> tuple[str, ...]:
    """The fields of which devices hold different parts, [devices, ...] (layout.py)."""
    if config.parallel.splits_model or config.parallel.zero == 3:
        return "opt_state", "params", "ema"
    return ("opt_state",) if config.parallel.zero else ()


def init_params(config: Config, model: Model) -> Params:
    """Initial parameters, determined by the seed."""
    return jax.jit(model.init)(jax.random.key(config.seed))  # without jit, each operation would compile by itself


def init_whole(config: Config, params: Params) -> TrainState:
    """The initial state with these parameters, no field in parts, and without the state of the reduction."""
    own = float32(trained.part(config, params))
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        opt_state=make_optimizer(config.optim, config.steps).init(own),
        ema=jax.tree.map(jnp.copy, own) if config.optim.ema_decay else None,
        sync=None,
        guard=guard.init(),
        loss_mean=loss_mean.init(),
    )


def init_sync(config: Config, model: Model, num_devices: int) -> Any:
    """The initial state of the reduction, [devices, ...]."""
    device = one_device(config, model, num_devices)
    like = trained.part(config, device.params)
    sync = device.sync.init(jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), like))
    return jax.tree.map(lambda x: jnp.broadcast_to(x, (num_devices, *x.shape)), sync)


def init_state(config: Config, model: Model, num_devices: int) -> TrainState:
    """The initial state as the step takes it, where devices hold the same or, with ZeRO, parts of that."""
    params = init_params(config, model)
    state = spread(config, init_whole(config, params), num_devices)
    return state._replace(sync=init_sync(config, model, num_devices))


def spread(config: Config, whole: TrainState, num_devices: int) -> TrainState:
    """A state with its sharded fields cut into parts."""
    assert not config.parallel.splits_model
    return whole._replace(**{f: zero.spread(getattr(whole, f), num_devices) for f in sharded_fields(config)})


def make_train_step(
    config: Config, model: Model, devices: list[Device], history: LrHistory = UNTOUCHED
) -> Callable[[TrainState, Batch], tuple[TrainState, dict[str, Any]]]:
    """Returns the step of one device: (state, its part of the batch) -> (new state, metrics of the global batch)."""
    own = one_device(config, model, len(devices), devices[0].platform)
    grid, sync, everyone = own.grid, own.sync, own.grid.everyone
    optimizer = make_optimizer(config.optim, config.steps, sharing_of(config, devices, own), history)
    schedule = make_schedule(config.optim, config.steps, "lr", history)
    gradients = make_gradients(config, own)
    of_layers = layer_stats.make_layer_stats(config, own)

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, Any]]:
        batch = own.tokens_of(batch)
        # Devices may hold different numbers of targets. Dividing each device's sum by the mean number, before the mean
        # over devices, gives every target of the global batch the same weight. Without targets the gradient is zero.
        counts = {"targets": jnp.sum(batch["targets"] >= 0, dtype=jnp.float32)}
        counts |= {name: batch[name] for name in ("stop",) if name in batch}  # of the processes asked to stop
        batch = {name: x for name, x in batch.items() if name != "stop"}
        means = everyone.mean(counts)
        mean_targets = jnp.maximum(means["targets"], NO_TARGETS)

        # The gradient of the global batch: forward, backward and the mean over the devices (make_gradients).
        keys = _dropout_keys(config, state.step, grid.replica(), batch["inputs"].shape[0])
        own_params = trained.part(config, state.params)
        frozen = trained.without(state.params, own_params)
        masters = float32(own_params)  # whatever dtype they are stored in
        micro = micro_batches((batch, keys), config.optim.accum_steps)
        grads, sums, sync_state = gradients(masters, frozen, micro, mean_targets, state.sync)

        # One factor for the guard and for clipping.
        numbers = guard.agree(state.guard, sums.losses.nll, sync.global_norm(grads), everyone)
        accepted, scale, new_guard = guard.judge(state.guard, numbers, mean_targets, config.optim, model.vocab_size)
        if config.optim.clip_norm:
            scale = jnp.minimum(scale, config.optim.clip_norm / jnp.maximum(numbers.norm, 1e-9))
        clipped = jax.tree.map(lambda g: g * scale, grads)

        # The update.
        mine = sync.own(masters)  # what this device updates: all that it holds, or its parts of it
        updates, opt_state = optimizer.update(clipped, state.opt_state, mine)
        masters = sync.whole(optax.apply_updates(mine, updates))

        metrics = {"loss": numbers.nll / mean_targets, "lr": schedule(state.step), "grad_norm": numbers.norm}
        loss = jnp.where(mean_targets > NO_TARGETS, metrics["loss"], jnp.nan)
        metrics["loss_mean"], new_loss_mean = loss_mean.push(state.loss_mean, loss, state.step + 1, config)
        metrics |= {key: getattr(new_guard, key) for key in ("skipped", "spikes", "in_row", "high")}
        if config.log.layer_stats:
            change = layer_stats.Change(grads, mine, updates, accepted)
            metrics |= of_layers(change, sums.squares_L, batch["targets"].size)
        if "stop" in means:  # more than 0 if any process was asked to stop: all see it at the same step
            metrics["stop"] = means["stop"]

        # The new state, or the old one if the guard did not accept the step.
        ema = update_ema(state.ema, masters, state.step, config.optim.ema_decay)
        rounding = jax.random.fold_in(jax.random.key(config.seed), state.step)
        params = stored(masters, own_params, rounding if sync.gather is None else grid.copies.own_key(rounding))
        new, old = (params, opt_state, ema, sync_state), (own_params, state.opt_state, state.ema, state.sync)
        params, opt_state, ema, sync_state = guard.either(accepted, new, old)
        new_state = TrainState(
            step=state.step + 1,
            params=trained.joined(frozen, params),
            opt_state=opt_state,
            ema=ema,
            sync=sync_state,
            guard=new_guard,
            loss_mean=new_loss_mean,
        )
        return new_state, metrics

    return train_step


def float32(params: Params) -> Params:
    return jax.tree.map(lambda p: p.astype(jnp.float32), params)


def stored(params: Params, like: Params, key: jax.Array) -> Params:
    """Converts float32 parameters to the dtypes of `like`, in which they are stored; bfloat16 by stochastic rounding.

    Most updates are smaller than half the distance between two bfloat16 numbers. Rounding up or down at random, with
    probabilities that preserve the mean, does not lose them (Gupta et al., Deep Learning with Limited Numerical
    Precision, 2015).
    """

    def rounded(i: int, x: jax.Array, dtype: jnp.dtype) -> jax.Array:
        if dtype == jnp.float32:
            return x
        bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
        noise = jax.random.bits(jax.random.fold_in(key, i), x.shape, jnp.uint16)
        up = jax.lax.bitcast_convert_type((bits + noise) & jnp.uint32(0xFFFF0000), jnp.float32)
        return jnp.where(jnp.isfinite(x), up, x).astype(dtype)

    leaves, tree = jax.tree.flatten(params)
    dtypes = [x.dtype for x in jax.tree.leaves(like)]
    return jax.tree.unflatten(tree, [rounded(i, x, d) for i, (x, d) in enumerate(zip(leaves, dtypes, strict=True))])


def update_ema(ema: Params | None, params: Params, step: jax.Array, decay: float) -> Params | None:
    """ema <- d * ema + (1 - d) * params, with a smaller d in the first steps, to forget the initial parameters."""
    if ema is None:
        return None
    d = jnp.minimum(decay, (1 + step) / (10 + step))
    return jax.tree.map(lambda e, p: d * e + (1 - d) * p, ema, params)


def _dropout_keys(config: Config, step: jax.Array, replica: jax.Array, batch: int) -> jax.Array | None:
    """A key for each sequence, from its row in the global batch, so that masks do not depend on the devices."""
    if not (config.model.dropout or config.model.lora_dropout):
        return None
    key = jax.random.fold_in(jax.random.key(config.seed + 1), step)
    rows_B = replica * batch + jnp.arange(batch)
    return jax.vmap(lambda row: jax.random.fold_in(key, row))(rows_B)


def make_eval_step(
    config: Config, model: Model, devices: list[Device]
) -> Callable[[Params, Batch], dict[str, jax.Array]]:
    """Returns the evaluation step of one device: (params, its part of the batch) -> sums over the global batch.

    The batch also has `bytes`, float32 [B, T]: the number of UTF-8 bytes that each target stands for.
    """

    own = one_device(config, model, len(devices), devices[0].platform)
    sums_of = make_eval_sums(config, own)

    def eval_step(params: Params, batch: Batch) -> dict[str, jax.Array]:
        stop = batch.get("stop")
        batch = own.tokens_of({name: x for name, x in batch.items() if name != "stop"})
        sums = sums_of(params, batch)._asdict() | {"bytes": jnp.sum(batch["bytes"])}
        found = own.grid.copies.sum(sums)
        if stop is not None:  # added last: on CPU, no collective may run beside those of the model (overlap.after)
            found["stop"] = own.grid.everyone.sum(overlap.after(stop, sums["targets"]))
        return found

    return eval_step


def pmap_train_step(config: Config, step: Callable, devices: list[Device]) -> Callable:
    """The step on all devices: (state, batch [local devices, ...]) -> (state, metrics). The state is donated."""
    axes = state_axes(config)
    program = runtime.kept(
        jax.pmap(step, axis_name=AXIS, in_axes=(axes, 0), out_axes=(axes, None), donate_argnums=0, devices=devices)
    )
    return together.compiled(program, "training step")


def pmap_eval_step(config: Config, step: Callable, devices: list[Device]) -> Callable:
    """Returns the evaluation on all devices: (params, batch [local devices, ...]) -> sums over the global batch."""
    axes = (state_axes(config).params, 0)
    program = runtime.kept(jax.pmap(step, axis_name=AXIS, in_axes=axes, out_axes=None, devices=devices))
    return together.compiled(program, "evaluation step")
