"""Runs steps on simulated devices, divided in any way, and compares them with others."""

from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.checkpoint.replicas import Replicas
from jaxlm.config import Config
from jaxlm.config.files import load
from jaxlm.data import Share
from jaxlm.model import make_model
from jaxlm.train import step as train_step
from jaxlm.train import trained
from jaxlm.train.placement import Placement

CONFIG = Path(__file__).parents[1] / "configs/debug.py"
ROWS, T, VOCAB, STEPS = 24, 8, 29, 3
RTOL = 1e-5  # float32, with some hundred additions in another order
# Three layers and odd sizes, so that neither divides evenly over the devices.
BASE = [
    "steps=10",
    f"batch_size={ROWS}",
    f"seq_len={T}",
    "model.num_layers=3",
    "model.d_model=20",
    "model.num_heads=2",
    "model.scan_unroll=1",
    "optim.lr=0.01",
    "optim.eps=1e-3",
    "optim.clip_norm=0.5",
    "optim.ema_decay=0.9",
    "optim.warmup_steps=0",
    "optim.schedule=constant",
    "optim.weight_decay=0.1",
]

# Data for models with an encoder.
PAIRS = ["data.source=functions", "data.prompt_key=docstring", "data.response_key=name", "data.packing=document"]


def make_config(*overrides: str) -> Config:
    return load(CONFIG, [f"--config.{o}" for o in (*BASE, *overrides)])


class Result(NamedTuple):
    metrics: np.ndarray  # [steps, 2]
    stats: dict[str, Any]  # statistics of layers in the last step
    params: Any
    ema: Any
    opt_state: Any  # whole
    held: dict[str, int]  # bytes on the fullest device, by field of the state
    state: train_step.TrainState
    placement: Placement
    config: Config


def batch(seed: int, rows: int = ROWS, length: int = T) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, VOCAB, (2, rows, length), dtype=np.int32)
    return {"inputs": tokens[0], "targets": np.where(rng.random((rows, length)) < 0.7, tokens[1], -1)}


def prompts(config: Config, seed: int, answers: np.ndarray) -> dict[str, np.ndarray]:
    """Two prompts in each row, for an encoder; answers have `packed` positions."""
    shape = len(answers), config.model.encoder_len
    tokens = np.random.default_rng(100 + seed).integers(0, VOCAB, shape, dtype=np.int32)
    return {"prompts": tokens, "prompt_positions": packed(tokens)}


def packed(tokens: np.ndarray) -> np.ndarray:
    """Positions of two documents in each row, which begin at 0."""
    place, cuts = np.arange(tokens.shape[1]), 1 + tokens[:, :1] % (tokens.shape[1] - 1)
    return np.where(place < cuts, place, place - cuts).astype(np.int32)


def lively(params: Any) -> Any:
    """Replaces the output layer, which is initially zero: then no gradient would reach the other layers."""
    return {
        k: {"kernel": (0.3 * jax.random.normal(jax.random.key(1), v["kernel"].shape)).astype(v["kernel"].dtype)}
        if k == "head"
        else v
        for k, v in params.items()
    }


RESULTS: dict[Any, Result] = {}


def train(devices: int, *overrides: str, steps_done: int = STEPS) -> Result:
    if (devices, overrides) not in RESULTS:
        config = make_config(*overrides)
        model = make_model(config.model, VOCAB, config.seq_len)
        local = jax.devices()[:devices]
        placement = Placement(config, model, local)
        state = placement.initial()
        whole = placement.saved(state)
        assert whole is not None
        params = lively(whole.params)
        average = jax.tree.map(jnp.copy, trained.part(config, params))
        state = placement.restored(whole._replace(params=params, ema=average))
        step = train_step.pmap_train_step(config, train_step.make_train_step(config, model, local), local)
        metrics, m = [], {}
        for seed in range(steps_done):
            rows = batch(seed, config.batch_size, config.seq_len)
            if config.data.packing == "document":
                rows["positions"] = packed(rows["inputs"])
            if config.model.encoder_layers:
                rows |= prompts(config, seed, rows["inputs"])
            rows = Share(devices, of_a_replica=config.parallel.of_a_replica).shard(rows)
            state, m = step(state, jax.device_put(rows, placement.batch))
            metrics.append([float(m["loss"]), float(m["grad_norm"])])
        saved = jax.device_get(placement.saved(state))
        RESULTS[devices, overrides] = Result(
            np.array(metrics),
            {key: np.asarray(x) for key, x in m.items() if "/" in key},
            saved.params,
            saved.ema,
            saved.opt_state,
            held_bytes(state, local),
            state,
            placement,
            config,
        )
    return RESULTS[devices, overrides]


def held_bytes(state: train_step.TrainState, devices: list[Any]) -> dict[str, int]:
    def of(tree: Any, device: Any) -> int:
        return sum(s.data.nbytes for x in jax.tree.leaves(tree) for s in x.addressable_shards if s.device == device)

    return {name: max(of(part, d) for d in devices) for name, part in state._asdict().items()}


def gap(got: Any, want: Any) -> float:
    def one(a: np.ndarray, b: np.ndarray) -> float:
        return float(np.abs(a - b).max() / max(np.abs(b).max(), 1e-30))

    return max(jax.tree.leaves(jax.tree.map(one, got, want)))


def assert_same(got: Result, want: Result) -> None:
    np.testing.assert_allclose(got.metrics, want.metrics, rtol=RTOL / 5)
    assert gap(got.params, want.params) < 2 * RTOL
    assert gap(got.ema, want.ema) < 2 * RTOL
    assert gap(got.opt_state, want.opt_state) < 2 * RTOL


def check_comes_back(result: Result) -> None:
    """Saves and restores the state, and checks that replicated arrays have the same bits on all devices."""
    Replicas(result.config, result.placement.here).check(1, result.state)
    saved = result.placement.saved(result.state)
    assert saved is not None
    back = result.placement.restored(saved)
    assert jax.tree.structure(back) == jax.tree.structure(result.state)
    parallel, layers = result.config.parallel, result.config.model.num_layers
    is_filled = layers % (parallel.pipeline * parallel.chunks)  # with layers whose state is in no checkpoint
    for a, b in zip(jax.tree.leaves(back), jax.tree.leaves(result.state), strict=True):
        if not is_filled:
            np.testing.assert_array_equal(a, b)
        assert a.sharding.is_equivalent_to(b.sharding, a.ndim)
    again = result.placement.saved(back)
    jax.tree.map(np.testing.assert_array_equal, again, saved)
    for a, b in zip(jax.tree.leaves(result.placement.saved_like(result.state)), jax.tree.leaves(saved), strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype and a.sharding.is_equivalent_to(b.sharding, b.ndim)
