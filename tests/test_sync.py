"""Strategies that move gradients: the one there is, and others put in its place without a change to the step."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm import step as steps
from jaxlm.checkpoint import place
from jaxlm.cli import load
from jaxlm.config import Config, ParallelConfig
from jaxlm.model import make_model
from jaxlm.optimizer import make_optimizer
from jaxlm.sync import GradSync, make_sync

CONFIG = Path(__file__).parents[1] / "configs/debug.py"
AXIS, DEVICES = steps.AXIS, 3
RTOL = 1e-5


def make_config(*overrides: str) -> Config:
    base = ["steps=10", "batch_size=6", "seq_len=8", "model.d_model=20", "model.scan_unroll=1", "optim.lr=0.01",
            "optim.eps=1e-3", "optim.warmup_steps=1", "optim.schedule=constant", "optim.clip_norm=0.5"]  # fmt: skip
    return load(CONFIG, [f"--config.{o}" for o in (*base, *overrides)])


def batch(seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    shape = (DEVICES, 2, 8)
    tokens = rng.integers(0, 29, (2, *shape), dtype=np.int32)
    return {"inputs": tokens[0], "targets": np.where(rng.random(shape) < 0.5, tokens[1], -1)}


def per_device(shape: tuple[int, ...], seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(8, *shape)).astype(np.float32)


@pytest.mark.parametrize("devices", [1, 2, 3, 8])
def test_pmean_is_the_mean_over_devices(devices: int):
    sync = make_sync(ParallelConfig(devices=0, reduce="pmean"), AXIS)
    grads = {"a": per_device((5,), 0)[:devices], "b": {"c": per_device((3, 7), 1)[:devices]}}
    reduce = jax.pmap(sync.reduce, axis_name=AXIS, devices=jax.devices()[:devices])
    reduced, state = reduce(grads, ())
    assert state == ()
    for got, each in ((reduced["a"], grads["a"]), (reduced["b"]["c"], grads["b"]["c"])):
        mean = each.astype(np.float64).mean(axis=0)
        # A float32 sum of n numbers is off by at most n eps times the sum of their sizes.
        bound = devices * np.finfo(np.float32).eps * np.abs(each).sum(axis=0).max()
        for device in range(devices):
            np.testing.assert_allclose(np.asarray(got[device]), mean, rtol=0, atol=bound)


# Two strategies of the test's own. The first only moves the gradients otherwise; with the second, every device
# updates a part of the parameters, and has the optimizer state of that part.


def _pad(x: jax.Array) -> jax.Array:
    return jnp.pad(x.reshape(-1), (0, -x.size % DEVICES))


def _scatter(tree: Any) -> Any:
    return jax.tree.map(lambda g: jax.lax.psum_scatter(_pad(g), AXIS, tiled=True) / DEVICES, tree)


def _gather(parts: Any, like: Any) -> Any:
    def whole(part: jax.Array, x: jax.Array) -> jax.Array:
        return jax.lax.all_gather(part, AXIS, tiled=True)[: x.size].reshape(x.shape)

    return jax.tree.map(whole, parts, like)


def _part(x: Any, index: Any) -> Any:
    size = -(-x.size // DEVICES)
    return jax.lax.dynamic_slice_in_dim(_pad(x), index * size, size)


def scatter_gather() -> GradSync:
    return GradSync(
        init=lambda params, n: jnp.zeros((n, 1)),  # counts the calls, to show that state comes back
        reduce=lambda grads, state: (_gather(_scatter(grads), grads), state + 1 + jax.lax.axis_index(AXIS)),
    )


def sharded(like: Any) -> GradSync:
    def global_norm(parts: Any) -> jax.Array:
        return jnp.sqrt(jax.lax.psum(sum(jnp.sum(p**2) for p in jax.tree.leaves(parts)), AXIS))

    return GradSync(
        init=lambda params, n: (),
        reduce=lambda grads, state: (_scatter(grads), state),
        shard=lambda params: jax.tree.map(lambda p: _part(p, jax.lax.axis_index(AXIS)), params),
        gather=lambda parts: _gather(parts, like),
        global_norm=global_norm,
    )


def train(
    config: Config, prepare: Callable[[steps.TrainState], steps.TrainState] = lambda s: s
) -> tuple[Any, list[float]]:
    local, model = jax.devices()[:DEVICES], make_model(config.model, 29, 8)
    state = steps.init_state(config, model, DEVICES)
    # The output layer starts at zero, and then no gradient reaches the others.
    head = jax.random.normal(jax.random.key(1), (20, 29))
    state = prepare(state._replace(params=state.params | {"head": {"kernel": head}}))
    step = steps.pmap_train_step(steps.make_train_step(config, model, local), local)
    norms = []
    for seed in range(3):
        state, metrics = step(state, batch(seed))
        norms.append(float(metrics["grad_norm"]))
    return jax.device_get(state), norms


def assert_close(got: Any, want: Any) -> None:
    def check(a: np.ndarray, b: np.ndarray) -> None:
        np.testing.assert_allclose(a, b, rtol=0, atol=RTOL * np.abs(b).max())

    jax.tree.map(check, got, want)


@pytest.mark.parametrize("overrides", [["optim.name=adamw", "optim.weight_decay=0.1"], ["optim.name=muon"]])
def test_another_way_to_reduce_slots_in(monkeypatch: pytest.MonkeyPatch, overrides: list[str]):
    config = make_config(*overrides)
    local = jax.devices()[:DEVICES]
    want, norms = train(config, lambda state: place(state, local))
    monkeypatch.setattr(steps, "make_sync", lambda parallel, axis: scatter_gather())
    got, other_norms = train(config, lambda state: place(state, local))
    np.testing.assert_array_equal(got.sync[:, 0], 3 * (1 + np.arange(DEVICES)))  # each device has its own
    assert_close(got.params, want.params)
    np.testing.assert_allclose(other_norms, norms, rtol=RTOL)


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_sharded_updates_slot_in(monkeypatch: pytest.MonkeyPatch, name: str):
    """Reduce-scatter, update of one's own part, all-gather: sizes do not divide, so parts are padded."""
    config = make_config(f"optim.name={name}", "optim.weight_decay=0.1")
    want, norms = train(config)
    assert any(x.size % DEVICES for x in jax.tree.leaves(want.params))
    params = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), want.params)
    monkeypatch.setattr(steps, "make_sync", lambda parallel, axis: sharded(params))
    monkeypatch.setattr(steps, "STATE_AXES", cast(Any, steps.STATE_AXES)._replace(opt_state=0))

    def own_optimizer_state(state: steps.TrainState) -> steps.TrainState:
        optimizer = make_optimizer(config.optim, config.steps)
        each = [optimizer.init(jax.tree.map(lambda x, i=i: _part(x, i), state.params)) for i in range(DEVICES)]
        return state._replace(opt_state=jax.tree.map(lambda *parts: jnp.stack(parts), *each))

    got, other_norms = train(config, own_optimizer_state)
    biggest = max(x.size for x in jax.tree.leaves(got.opt_state))
    assert biggest < max(x.size for x in jax.tree.leaves(want.params)) + DEVICES  # over all devices together
    assert_close(got.params, want.params)
    np.testing.assert_allclose(other_norms, norms, rtol=RTOL)


def test_these_gradients_need_the_exchange(monkeypatch: pytest.MonkeyPatch):
    """Without any exchange the parameters differ by far more than the tests above allow."""
    config = make_config("optim.name=adamw")
    want, norms = train(config)
    alone = GradSync(init=lambda params, n: (), reduce=lambda grads, state: (grads, state))
    monkeypatch.setattr(steps, "make_sync", lambda parallel, axis: alone)
    got, other_norms = train(config)
    assert abs(other_norms[0] / norms[0] - 1) > 1000 * RTOL
    with pytest.raises(AssertionError):
        assert_close(got.params, want.params)
