"""Runs steps under pmap on ragged batches, and the same steps with plain `jax.grad` and optax on one device."""

from functools import cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxlm.config import Config
from jaxlm.config.files import load
from jaxlm.model import Model, make_model
from jaxlm.train import step as train_step
from jaxlm.train.optimizer import make_optimizer, matrix_mask
from jaxlm.train.placement import Placement
from tests.decoders import logits_of
from tests.runs import CONFIG

VOCAB, T, STEPS = 29, 8, 3
RTOL = 1e-5  # the trainer's promise for float32, whose eps is 1.2e-7

# eps is far above the rounding error of a gradient. With 1e-8, Adam would scale the rounding of a zero gradient up to a
# whole step.
ADAMW = ["optim.name=adamw", "optim.eps=1e-3", "optim.weight_decay=0.1"]
MUON = ["optim.name=muon", "optim.eps=1e-3"]


def make_config(*overrides: str) -> Config:
    base = [
        "steps=10",
        "batch_size=16",
        f"seq_len={T}",
        "model.d_model=16",
        "model.scan_unroll=1",
        "optim.lr=0.01",
        "optim.adam_lr=0.01",
        "optim.schedule=constant",
        "optim.warmup_steps=2",
        "optim.clip_norm=0.5",
    ]
    return load(CONFIG, [f"--config.{o}" for o in (*base, *overrides)])


def make(config: Config) -> Model:
    return make_model(config.model, VOCAB, T)


def ragged_batch(rows: int, seed: int) -> Any:
    """Returns a global batch `[rows, T]` with missing targets.

    The first eighth of the rows has no target, the second at most one, the others about half of their targets.
    """
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, VOCAB, (rows, T + 1), dtype=np.int32)
    there = rng.random((rows, T)) < rng.uniform(0.1, 0.9, (rows, 1))
    there[: rows // 8] = False
    there[rows // 8 : rows // 4, 1:] = False
    return {"inputs": tokens[:, :-1], "targets": np.where(there, tokens[:, 1:], -1)}


def split(batch: train_step.Batch, devices: int) -> train_step.Batch:
    return {k: v.reshape(devices, -1, *v.shape[1:]) for k, v in batch.items()}


def lively(params: Any) -> Any:
    """Adds noise to initial parameters. An untrained model predicts all tokens alike, so its loss would hide errors."""
    leaves, tree = jax.tree.flatten(params)
    rng = np.random.default_rng(0)
    return jax.tree.unflatten(tree, [x + 0.3 * rng.normal(size=x.shape).astype(np.float32) for x in leaves])


class Result(NamedTuple):
    losses: list[float]
    grad_norms: list[float]
    params: Any  # after all steps
    ema: Any


COMPILED: dict[tuple[str, int], Any] = {}  # (configuration, devices) -> the compiled step and the initial state


def start(config: Config, devices: int) -> train_step.TrainState:
    fresh = train_step.init_params(config, make(config))
    params = jax.tree.map(lambda p, old: jnp.asarray(p, old.dtype), lively(fresh), fresh)
    whole = train_step.init_whole(config, params)
    state = train_step.spread(config, whole, devices)
    return state._replace(sync=train_step.init_sync(config, make(config), devices))


def whole_state(config: Config, devices: int, state: train_step.TrainState) -> train_step.TrainState:
    """Returns a state without parts, in NumPy."""
    saved = Placement(config, make(config), jax.devices()[:devices]).saved(state)
    assert saved is not None
    return jax.device_get(saved)


def built(config: Config, devices: int) -> tuple[Any, train_step.TrainState]:
    """Returns the step on `devices` devices, and its initial state."""
    key, local, model = (str(config), devices), jax.devices()[:devices], make(config)
    if key not in COMPILED:
        step = train_step.pmap_train_step(config, train_step.make_train_step(config, model, local), local)
        COMPILED[key] = step, jax.device_get(start(config, devices))
    step, state = COMPILED[key]
    return step, Placement(config, make(config), local).place(state)


def run_pmap(config: Config, devices: int, batches: list[train_step.Batch]) -> Result:
    step, state = built(config, devices)
    metrics = []
    for batch in batches:
        state, m = step(state, split(batch, devices))
        metrics.append(jax.device_get(m))
    losses, norms = ([float(m[key]) for m in metrics] for key in ("loss", "grad_norm"))
    whole = whole_state(config, devices, state)
    return Result(losses, norms, whole.params, whole.ema)


@cache
def reference_update(optimizer: tuple[str, ...]) -> tuple[Any, Any, Any]:
    """Returns initial parameters, optimizer state, and an update that does not use `step.py`."""
    config = make_config(*optimizer)
    model, c = make(config), config.optim
    if c.name == "adamw":
        schedule = optax.linear_schedule(c.lr / 2, c.lr, 1)  # two warmup steps, then constant
        chain = optax.adamw(schedule, c.b1, c.b2, c.eps, weight_decay=c.weight_decay, mask=matrix_mask)
    else:
        chain = make_optimizer(c, config.steps)  # on one device, without sharing
    chain = optax.chain(optax.clip_by_global_norm(c.clip_norm), chain)

    def loss(params: Any, batch: train_step.Batch) -> jax.Array:
        log_probs = jax.nn.log_softmax(logits_of(model)(params, batch["inputs"]))
        nll = -jnp.sum(log_probs * jax.nn.one_hot(batch["targets"], VOCAB), axis=-1)  # one_hot(-1) is all zeros
        return jnp.sum(nll) / jnp.sum(batch["targets"] >= 0)

    @jax.jit
    def update(params: Any, opt_state: Any, batch: train_step.Batch) -> tuple[Any, Any, jax.Array, jax.Array]:
        value, grads = jax.value_and_grad(loss)(params, batch)
        updates, opt_state = chain.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, value, optax.tree.norm(grads)

    params = lively(model.init(jax.random.key(config.seed)))
    return params, chain.init(params), update


def run_reference(optimizer: tuple[str, ...], batches: list[train_step.Batch]) -> Result:
    """Trains on the weighted mean over the whole batch, on one device."""
    params, opt_state, update = reference_update(optimizer)
    losses, norms = [], []
    for batch in batches:
        params, opt_state, value, norm = update(params, opt_state, batch)
        losses.append(float(value))
        norms.append(float(norm))
    return Result(losses, norms, jax.device_get(params), None)


def gap(a: Any, b: Any) -> float:
    """Returns the largest difference between leaves of two trees, relative to the largest value of the leaf in `b`."""
    return max(jax.tree.leaves(jax.tree.map(lambda x, y: float(np.max(np.abs(x - y)) / np.max(np.abs(y))), a, b)))


def assert_same(got: Result, want: Result) -> None:
    np.testing.assert_allclose(got.losses, want.losses, rtol=RTOL)
    np.testing.assert_allclose(got.grad_norms, want.grad_norms, rtol=RTOL)
    assert gap(got.params, want.params) < RTOL


BATCHES = {rows: [ragged_batch(rows, seed) for seed in range(STEPS)] for rows in (16, 24)}


@cache
def reference(optimizer: tuple[str, ...], rows: int) -> Result:
    return run_reference(optimizer, BATCHES[rows])
