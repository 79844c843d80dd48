"""Compares the step, with each way to share and to overlap, with the plain step on one device: losses, gradient norms,
parameters, their moving average, and the optimizer's state as it is in a checkpoint.
"""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.checkpoint.reading import Checkpoints
from jaxlm.checkpoint.writing import Saver
from jaxlm.model import make_model
from jaxlm.sync import Group
from jaxlm.sync.sharing import by_parts
from jaxlm.sync.zero import Zero, joined, spread
from jaxlm.train.optimizer import make_optimizer
from jaxlm.train.placement import Placement
from tests.grids import RTOL, STEPS, VOCAB, Result, T, assert_same, batch, check_comes_back, gap, make_config, train

SHARDED = {1: ["opt_state"], 2: ["opt_state"], 3: ["opt_state", "params", "ema"]}


@pytest.mark.parametrize(
    "zero, name, devices, overrides",
    [
        (1, "adamw", 8, []),
        pytest.param(1, "muon", 3, ["parallel.bucket_mb=0.002"], marks=pytest.mark.ci),
        (1, "muon", 4, ["parallel.overlap=true", "parallel.reduce=ring", "optim.accum_steps=2"]),
        pytest.param(2, "adamw", 3, ["parallel.reduce=ring", "optim.accum_steps=4"], marks=pytest.mark.ci),
        (2, "muon", 4, ["model.scan_unroll=0"]),
        (3, "adamw", 8, ["optim.accum_steps=3", "model.tie_embeddings=true", "parallel.bucket_mb=0.001"]),
        (3, "muon", 3, ["parallel.reduce=ring"]),
        pytest.param(3, "adafactor", 3, ["model.remat=full", "model.scan_unroll=0"], marks=pytest.mark.ci),
        pytest.param(3, "lion", 2, [], marks=pytest.mark.ci),
        (3, "sgd", 4, ["model.remat=dots"]),
    ],
)
def test_zero_is_the_same_training_with_a_part_of_the_state(zero: int, name: str, devices: int, overrides: list[str]):
    got = train(devices, f"optim.name={name}", f"parallel.zero={zero}", *overrides)
    want = train(1, f"optim.name={name}", *(o for o in overrides if o.startswith("model.tie")))
    assert_same(got, want)
    check_comes_back(got)
    for field in SHARDED[zero]:
        # Bytes per device: 1/N of all, and at most one float32 more for each tensor of a layer.
        tensors = sum(x.shape[0] if x.ndim > 1 else 1 for x in jax.tree.leaves(getattr(want, field)))
        assert got.held[field] <= want.held[field] / devices + 4 * tensors
        assert want.held[field] > 8 * 4 * tensors  # so that the bound is not trivial


@pytest.mark.parametrize(
    "devices, overrides",
    [
        (3, []),
        (2, ["model.scan_unroll=0", "model.remat=full"]),
        (4, ["optim.accum_steps=3", "parallel.bucket_mb=0.001", "parallel.reduce=ring", "model.tie_embeddings=true"]),
    ],
)
def test_overlap_is_the_same_training(devices: int, overrides: list[str]):
    model = tuple(o for o in overrides if o.startswith("model.tie"))
    got = train(devices, "optim.name=adamw", "parallel.overlap=true", *overrides)
    assert_same(got, train(1, "optim.name=adamw", *model))


@pytest.mark.parametrize(
    "reduce, zero", [("bf16", 0), ("fp16", 0), ("int8", 0), ("topk", 0), ("powersgd", 0), ("int8", 1)]
)
def test_lossy_reductions_layer_by_layer(reduce: str, zero: int):
    """After one step of plain SGD, the parameters minus the mean residual equal those of the exact mean. Without
    residuals, the parameters are as close as the strategy promises. A state with residuals can be saved and restored.
    """
    sgd = ("optim.name=sgd", "optim.momentum=0", "optim.weight_decay=0", "optim.clip_norm=0", "optim.lr=1")
    want = train(3, *sgd, "parallel.overlap=true", steps_done=1)
    got = train(
        3,
        *sgd,
        "parallel.overlap=true",
        "parallel.topk_density=0.1",
        "parallel.powersgd_rank=2",
        f"parallel.reduce={reduce}",
        f"parallel.zero={zero}",
        steps_done=1,
    )
    lost = gap(got.params, want.params)
    if reduce in ("bf16", "fp16"):
        assert RTOL < lost < {"bf16": 2 * 2.0**-8, "fp16": 3 * 2.0**-11}[reduce]
    else:
        assert lost > 1e-3

        def without_kept(param: np.ndarray, kept: Any) -> np.ndarray:
            return param - kept["residual"].mean(axis=0).reshape(param.shape) if kept else param

        sync = jax.device_get(got.state.sync)
        assert gap(jax.tree.map(without_kept, got.params, sync), want.params) < RTOL / 5
    check_comes_back(got)


@pytest.mark.parametrize("devices", [2, 3, 8])
def test_factored_second_moments_of_parts(devices: int):
    """Adafactor factors matrices with dimensions of at least 128; ZeRO-1 also shards their row and column moments."""
    config = make_config("optim.name=adafactor")
    shapes = {"embed": {"embedding": (150, 130)}, "layers": {"mlp": {"kernel": (2, 130, 141), "bias": (2, 141)}}}
    rng = np.random.default_rng(0)

    def draw() -> Any:
        return jax.tree.map(
            lambda s: rng.normal(size=s).astype(np.float32), shapes, is_leaf=lambda x: isinstance(x, tuple)
        )

    params, all_grads = draw(), [draw() for _ in range(3)]
    plain = make_optimizer(config.optim, config.steps)
    zero = Zero(Group("d", devices), params)
    shared = make_optimizer(config.optim, config.steps, by_parts(zero))
    update = jax.pmap(
        lambda g, state, p: shared.update(zero.own(g), state, zero.own(p)),
        axis_name="d",
        in_axes=(None, 0, None),
        devices=jax.devices()[:devices],
    )
    want_state = plain.init(params)
    state = spread(want_state, devices)
    assert {x.shape for x in jax.tree.leaves(want_state)} >= {(2, 130), (2, 141), (150,), (130,)}
    for grads in all_grads:
        want, want_state = jax.jit(plain.update)(grads, want_state, params)
        got, state = update(grads, state, params)
        assert gap(joined(jax.device_get(got), params), want) < RTOL
        assert gap(joined(jax.device_get(state), want_state), jax.device_get(want_state)) < RTOL


def test_these_gradients_need_the_exchange():
    """The gradients of single devices differ by far more than the tests above allow."""
    config = make_config("optim.name=adamw")
    model = make_model(config.model, VOCAB, T)
    params = model.init(jax.random.key(0)) | {
        "head": {"kernel": 0.3 * jax.random.normal(jax.random.key(1), (20, VOCAB))}
    }

    def loss(params: Any, first: int) -> jax.Array:
        rows = batch(0)["inputs"][first : first + 8]
        return jnp.sum(jnp.square(model.unembed(params, model.hidden(params, rows)))) / len(rows)

    grad = jax.jit(jax.grad(loss), static_argnums=1)
    grads = [jax.device_get(grad(params, first)) for first in (0, 8)]
    assert gap(grads[0], grads[1]) > 1000 * RTOL


def saved_in(workdir: Path, result: Result) -> Checkpoints:
    saver = Saver(workdir, make_config().checkpoint)
    saver.finish(STEPS, result.placement.saved(result.state))
    saver.close()
    return Checkpoints(workdir)


@pytest.mark.parametrize("devices, overrides", [(2, ["parallel.zero=1"]), (4, ["parallel.zero=1"]), (1, [])])
def test_a_checkpoint_does_not_depend_on_the_number_of_devices(devices: int, overrides: list[str], tmp_path: Path):
    """Saved by three devices with ZeRO-1 and residuals; restored by other numbers, with and without ZeRO-1."""
    saved = train(3, "optim.name=muon", "parallel.zero=1", "parallel.reduce=int8")
    config = make_config("optim.name=muon", "parallel.reduce=int8", *overrides)
    checkpoints = saved_in(tmp_path, saved)
    placement = Placement(config, make_model(config.model, VOCAB, T), jax.devices()[:devices])
    fresh = placement.initial()
    found = checkpoints.restore(STEPS, placement, fresh)
    checkpoints.close()
    whole = jax.device_get(placement.saved(found))
    for name in ("params", "ema", "opt_state"):
        jax.tree.map(np.testing.assert_array_equal, getattr(whole, name), getattr(saved, name))
    # The residuals' mean over the devices stays the same.
    for a, b in zip(jax.tree.leaves(whole.sync), jax.tree.leaves(jax.device_get(saved.state.sync)), strict=True):
        assert len(a) == devices and np.abs(b).max() > 0
        np.testing.assert_allclose(a.mean(axis=0), b.mean(axis=0), rtol=0, atol=1e-6 * np.abs(b).max())


def test_another_reduction_takes_over_residuals_only_if_it_has_them(tmp_path: Path):
    saved = train(3, "optim.name=muon", "parallel.zero=1", "parallel.reduce=int8")
    checkpoints = saved_in(tmp_path, saved)
    for reduce, kept in (
        ("pmean", False),
        ("topk", True),
    ):  # the residual has the same meaning in both lossy reductions
        config = make_config("optim.name=muon", f"parallel.reduce={reduce}")
        placement = Placement(config, make_model(config.model, VOCAB, T), jax.devices()[:3])
        found = checkpoints.restore(STEPS, placement, placement.initial())
        leaves = jax.tree.leaves(found.sync)
        assert bool(leaves) == kept and all(np.abs(x).max() > 0 for x in leaves)
        jax.tree.map(np.testing.assert_array_equal, jax.device_get(found.params), saved.params)
    checkpoints.close()
