"""One optimizer step, written for one device and run on all under `jax.pmap`.

The state is replicated (`in_axes=None`): arrays have their natural shapes, with no leading device axis, but for
what a strategy keeps per device. Shapes: B sequences of this device, T time, N = B * T.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxlm.config import Config
from jaxlm.losses import LossSums, output_loss
from jaxlm.model import Model, Params
from jaxlm.optimizer import Sharing, make_optimizer, make_schedule
from jaxlm.sync import make_sync

AXIS = "devices"

Device = Any  # jax.Device, which type checkers take for a variable
# inputs, targets, and with packed documents positions: int32 [B, T]; a target of -1 where nothing is predicted.
Batch = dict[str, jax.Array]


class TrainState(NamedTuple):
    step: jax.Array  # optimizer updates done, int32
    params: Params
    opt_state: optax.OptState
    ema: Params | None  # moving average of params, where optim.ema_decay is set
    sync: Any  # of the gradient-synchronization strategy, [devices, ...]


# Which part of the state each device has its own of: None = the same everywhere, 0 = split along the first axis.
_AXES: dict[str, Any] = {"step": None, "params": None, "opt_state": None, "ema": None, "sync": 0}
STATE_AXES = TrainState(**_AXES)


def init_state(config: Config, model: Model, num_devices: int) -> TrainState:
    """The state of step 0; depends on the seed alone."""
    params = model.init(jax.random.key(config.seed))
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        opt_state=make_optimizer(config.optim, config.steps).init(float32(params)),
        ema=jax.tree.map(jnp.copy, float32(params)) if config.optim.ema_decay else None,
        sync=make_sync(config.parallel, AXIS).init(params, num_devices),
    )


def make_train_step(
    config: Config, model: Model, devices: list[Device]
) -> Callable[[TrainState, Batch], tuple[TrainState, dict[str, Any]]]:
    """The step of one of the devices: (state, its part of the batch) -> (state, metrics of the global batch)."""
    sync = make_sync(config.parallel, AXIS)
    optimizer = make_optimizer(config.optim, config.steps, sharing_of(devices))
    schedule = make_schedule(config.optim, config.steps)

    def loss(params: Params, batch: Batch, dropout_keys: jax.Array | None) -> tuple[jax.Array, LossSums]:
        x_ND = model.hidden(params, batch["inputs"], dropout_keys, batch.get("positions"))
        sums = output_loss(lambda x: model.unembed(params, x), x_ND, batch["targets"].reshape(-1), config.loss)
        return sums.objective, sums

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, Any]]:
        # Devices may hold different numbers of target tokens: divided by their mean number before the mean over
        # devices, every target of the global batch weighs the same. A batch without targets has a gradient of zero.
        targets = jnp.sum(batch["targets"] >= 0, dtype=jnp.float32)
        targets = jnp.maximum(jax.lax.pmean(targets, AXIS), 1e-9)
        keys = _dropout_keys(config, state.step, batch["inputs"].shape[0])
        masters = float32(state.params)  # whatever they are stored in
        grads, sums = accumulate(loss, masters, batch, keys, config.optim.accum_steps)
        grads, sync_state = sync.reduce(jax.tree.map(lambda g: g / targets, grads), state.sync)

        grad_norm = sync.global_norm(grads)
        if config.optim.clip_norm:
            scale = jnp.minimum(1.0, config.optim.clip_norm / jnp.maximum(grad_norm, 1e-9))
            grads = jax.tree.map(lambda g: g * scale, grads)
        shard = sync.shard(masters)
        updates, opt_state = optimizer.update(grads, state.opt_state, shard)
        masters = sync.gather(optax.apply_updates(shard, updates))

        metrics = {"loss": jax.lax.pmean(sums.nll, AXIS) / targets, "lr": schedule(state.step), "grad_norm": grad_norm}
        ema = update_ema(state.ema, masters, state.step, config.optim.ema_decay)
        params = stored(masters, config.model.param_dtype, jax.random.fold_in(jax.random.key(config.seed), state.step))
        return TrainState(state.step + 1, params, opt_state, ema, sync_state), metrics

    return train_step


def sharing_of(devices: list[Device]) -> Sharing:
    """Which of the run's devices share a host: on the axis, those of one host stand together."""
    hosts = [d.process_index for d in devices]
    size = hosts.count(hosts[0])
    groups = [list(range(i, i + size)) for i in range(0, len(hosts), size)]
    return Sharing(AXIS, size, groups if len(groups) > 1 else None)


def accumulate(
    loss: Callable, params: Params, batch: Batch, keys: jax.Array | None, steps: int
) -> tuple[Params, LossSums]:
    """Gradient and sums of `loss` over the batch, computed in `steps` micro-batches of which one is in memory.

    Gradients add up in float32; nothing is averaged here, so the result does not depend on `steps`.
    """
    grad = jax.grad(loss, has_aux=True)
    if steps == 1:
        return grad(params, batch, keys)
    micro = jax.tree.map(lambda x: x.reshape(steps, x.shape[0] // steps, *x.shape[1:]), (batch, keys))

    def add(total: Any, part: Any) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, grad(params, *part)), None

    shapes = jax.eval_shape(grad, params, *jax.tree.map(lambda x: x[0], micro))
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    return jax.lax.scan(add, zeros, micro)[0]


def float32(params: Params) -> Params:
    return jax.tree.map(lambda p: p.astype(jnp.float32), params)


def stored(params: Params, dtype: str, key: jax.Array) -> Params:
    """Parameters in the dtype they are kept in. In bfloat16 an update is mostly smaller than half the distance to the
    next number: rounded up or down at random, with the probabilities that keep the mean, it is not lost (Gupta et al.,
    Deep Learning with Limited Numerical Precision, 2015).
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
    """ema <- d * ema + (1 - d) * params, with a smaller d in the first steps, so that the start is soon forgotten."""
    if ema is None:
        return None
    d = jnp.minimum(decay, (1 + step) / (10 + step))
    return jax.tree.map(lambda e, p: d * e + (1 - d) * p, ema, params)


def _dropout_keys(config: Config, step: jax.Array, batch: int) -> jax.Array | None:
    """A key for each sequence, of its place in the global batch: masks do not depend on the number of devices."""
    if not config.model.dropout:
        return None
    key = jax.random.fold_in(jax.random.key(config.seed + 1), step)
    rows_B = jax.lax.axis_index(AXIS) * batch + jnp.arange(batch)
    return jax.vmap(lambda row: jax.random.fold_in(key, row))(rows_B)


def make_eval_step(config: Config, model: Model) -> Callable[[Params, Batch], dict[str, jax.Array]]:
    """The evaluation of one device: (params, its part of the batch) -> sums over the global batch.

    The batch has `bytes` too, float32 [B, T]: the UTF-8 bytes that each target stands for.
    """

    def eval_step(params: Params, batch: Batch) -> dict[str, jax.Array]:
        x_ND = model.hidden(params, batch["inputs"], positions_BT=batch.get("positions"))
        sums = output_loss(lambda x: model.unembed(params, x), x_ND, batch["targets"].reshape(-1), config.loss)
        return jax.lax.psum(sums._asdict() | {"bytes": jnp.sum(batch["bytes"])}, AXIS)

    return eval_step


def pmap_train_step(step: Callable, devices: list[Device]) -> Callable:
    """The step on all devices: (state, batch [local devices, ...]) -> (state, metrics); the state is donated."""
    return jax.pmap(
        step, axis_name=AXIS, in_axes=(STATE_AXES, 0), out_axes=(STATE_AXES, None), donate_argnums=0, devices=devices
    )


def pmap_eval_step(step: Callable, devices: list[Device]) -> Callable:
    """The evaluation on all devices: (params, batch [local devices, ...]) -> sums over the global batch."""
    return jax.pmap(step, axis_name=AXIS, in_axes=(None, 0), out_axes=None, devices=devices)
