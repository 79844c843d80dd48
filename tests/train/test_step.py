"""Compares an optimizer step on any number of devices with plain `jax.grad` and optax on one.

Batches are ragged: random places have no target, and some devices have no targets at all.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxlm.config import Config
from jaxlm.train import step as train_step
from jaxlm.train.accumulation import accumulate, micro_batches
from jaxlm.train.backward import loss_sums
from jaxlm.train.placement import Placement
from tests.stepping import (
    ADAMW,
    BATCHES,
    MUON,
    RTOL,
    STEPS,
    Result,
    T,
    assert_same,
    built,
    gap,
    lively,
    make,
    make_config,
    reference,
    run_pmap,
    run_reference,
    split,
    start,
)


@pytest.mark.parametrize(
    "rows, devices, accum",
    [
        (16, 1, 1),
        pytest.param(16, 2, 2, marks=pytest.mark.ci),
        pytest.param(16, 4, 4, marks=pytest.mark.ci),
        pytest.param(16, 8, 1, marks=pytest.mark.ci),
        (16, 8, 2),
        (24, 3, 4),
    ],
)
def test_any_split_is_the_gradient_of_the_whole_batch(rows: int, devices: int, accum: int):
    config = make_config(*ADAMW, f"batch_size={rows}", f"optim.accum_steps={accum}")
    assert_same(run_pmap(config, devices, BATCHES[rows]), reference(tuple(ADAMW), rows))


def test_matrices_converted_once_have_the_gradient_of_micro_batches_that_convert_them():
    """Bit for bit: no other parameter is rounded, and gradients are added up in float32."""
    config = make_config("model.dtype=bfloat16")
    model = make(config)
    params = lively(model.init(jax.random.key(0)))
    micro = micro_batches((BATCHES[16][0], None), 4)

    def loss(params: Any, *inputs: Any) -> tuple[jax.Array, Any]:
        sums = loss_sums(config, model, params, *inputs)
        return sums.objective, sums

    def converting(params: Any) -> Any:
        parts = [jax.grad(loss, has_aux=True)(params, *jax.tree.map(lambda x, i=i: x[i], micro))[0] for i in range(4)]
        return jax.tree.map(lambda *g: sum(g), *parts)

    rounded = {"xla_allow_excess_precision": False}  # otherwise XLA omits roundings to bfloat16 on CPU
    got = jax.jit(lambda p: accumulate(loss, p, micro, "bfloat16")[0], compiler_options=rounded)(params)
    want = jax.jit(converting, compiler_options=rounded)(params)
    assert {g.dtype for g in jax.tree.leaves(got)} == {jnp.dtype("float32")}
    jax.tree.map(np.testing.assert_array_equal, got, want)


@pytest.mark.parametrize("devices, accum", [(2, 1), (8, 2)])
def test_muon_with_shared_work_is_muon_on_one_device(devices: int, accum: int):
    config = make_config(*MUON, f"optim.accum_steps={accum}")
    assert_same(run_pmap(config, devices, BATCHES[16]), reference(tuple(MUON), 16))


def test_these_batches_tell_a_mean_of_device_means_from_the_right_one():
    """If the means of devices were averaged, the results would be far from those tested above."""
    batch = BATCHES[16][0]
    per_device = [{k: v[2 * i : 2 * i + 2] for k, v in batch.items()} for i in range(8)]
    targets = [int((part["targets"] >= 0).sum()) for part in per_device]
    assert targets[0] == 0 and len(set(targets)) > 4
    means = [run_reference(tuple(ADAMW), [part]) for part in per_device[1:]]  # the mean of device 0 would be 0 / 0
    right = reference(tuple(ADAMW), 16)
    biased = np.mean([m.losses[0] for m in means])
    assert abs(biased / right.losses[0] - 1) > 100 * RTOL
    total = np.average([m.losses[0] for m in means], weights=targets[1:])
    assert abs(total / right.losses[0] - 1) < RTOL


def test_dropout_masks_belong_to_sequences_not_to_devices():
    config = make_config(*ADAMW, "model.dropout=0.3")
    one = run_pmap(config, 1, BATCHES[16])
    assert_same(run_pmap(config, 4, BATCHES[16]), one)
    assert_same(run_pmap(make_config(*ADAMW, "model.dropout=0.3", "optim.accum_steps=2"), 8, BATCHES[16]), one)
    assert abs(one.losses[0] / reference(tuple(ADAMW), 16).losses[0] - 1) > 100 * RTOL, "nothing was dropped"


def test_dropout_masks_change_from_row_to_row_and_from_step_to_step():
    config = make_config("optim.name=sgd", "optim.lr=1e-30", "model.dropout=0.3")  # parameters do not change
    batches = []
    for place_of_row in (0, 1, 15, 15):
        batch = {k: np.repeat(v[5:6], 16, axis=0) for k, v in BATCHES[16][0].items()}
        batch["targets"] = np.where((np.arange(16) == place_of_row)[:, None], batch["targets"], -1)
        batches.append(batch)
    assert len(set(run_pmap(config, 4, batches).losses)) == 4
    first = [run_pmap(config, 4, [batch]).losses[0] for batch in batches]  # all in the first step
    assert len(set(first)) == 3 and first[2] == first[3]


@pytest.mark.parametrize("overrides", [ADAMW, [*MUON, "model.dropout=0.3"]], ids=["adamw", "muon-dropout"])
def test_vmap_over_the_axis_is_the_same_step(overrides: list[str]):
    config, devices = make_config(*overrides), 4
    model = make(config)
    step = train_step.make_train_step(config, model, jax.devices()[:devices])
    of_state = train_step.state_axes(config)
    axes: Any = {"axis_name": train_step.AXIS, "in_axes": (of_state, 0), "out_axes": (of_state, None)}
    mapped = jax.jit(jax.vmap(step, **axes))
    state, metrics = start(config, devices), []
    for batch in BATCHES[16]:
        state, m = mapped(state, split(batch, devices))
        metrics.append(m)
    losses, norms = ([float(m[key]) for m in metrics] for key in ("loss", "grad_norm"))
    want = run_pmap(config, devices, BATCHES[16])
    assert_same(Result(losses, norms, jax.device_get(state.params), None), want)
    assert int(state.step) == STEPS


SGD = ["optim.name=sgd", "optim.momentum=0", "optim.warmup_steps=0", "optim.lr=0.5"]  # update = -lr * clipped gradient


def update_norm(config: Config) -> tuple[float, float]:
    result = run_pmap(config, 2, BATCHES[16][:1])
    before = jax.device_get(start(config, 2).params)
    delta = jax.tree.map(lambda a, b: a.astype(np.float64) - b, result.params, before)
    return float(optax.tree.norm(delta)) / config.optim.lr, result.grad_norms[0]


def test_clip_norm_bounds_the_update_and_keeps_its_direction():
    unclipped, norm = update_norm(make_config(*SGD, "optim.clip_norm=0"))
    # The difference of parameters of size 1 has an error of eps in each of about a thousand parameters.
    tolerance = 1e-4
    assert norm > 0.5 and abs(unclipped / norm - 1) < tolerance
    clipped, reported = update_norm(make_config(*SGD, "optim.clip_norm=0.1"))
    assert abs(clipped / 0.1 - 1) < tolerance and reported == pytest.approx(norm, rel=RTOL)


def test_ema_follows_its_formula():
    step, state = built(make_config(*ADAMW, "optim.ema_decay=0.2"), 4)
    want = jax.tree.map(np.float64, jax.device_get(state.params))
    for n, batch in enumerate(BATCHES[16]):
        state, _ = step(state, split(batch, 4))
        d = min(0.2, (1 + n) / (10 + n))  # 0.1, 0.18, 0.2
        want = jax.tree.map(lambda e, p, d=d: d * e + (1 - d) * p, want, jax.device_get(state.params))
    assert gap(jax.device_get(state.ema), want) < RTOL
    assert gap(jax.device_get(state.params), want) > 10 * RTOL


def test_reported_rate_is_the_one_used():
    """With plain SGD, the update is the rate times the gradient, whose norm is also reported."""
    config = make_config(*SGD, "optim.clip_norm=0", "optim.schedule=linear", "optim.min_lr_ratio=0", "steps=4")
    step, state = built(config, 2)
    for n in range(3):
        before = jax.device_get(state.params)
        state, metrics = step(state, split(BATCHES[16][n], 2))
        moved = optax.tree.norm(
            jax.tree.map(lambda a, b: a.astype(np.float64) - b, jax.device_get(state.params), before)
        )
        assert float(metrics["lr"]) == pytest.approx(0.5 * (1 - n / 4), rel=1e-6)
        assert moved == pytest.approx(float(metrics["lr"] * metrics["grad_norm"]), rel=1e-4)


@pytest.mark.parametrize("optimizer", [ADAMW, MUON], ids=["adamw", "muon"])
def test_bfloat16_masters_learn_what_float32_ones_do(optimizer: list[str]):
    """Optimizer state and moving average stay in float32. Stochastic rounding keeps small updates in the mean."""
    extra = [
        "optim.ema_decay=0.9",
        "optim.lr=3e-4",
        "optim.adam_lr=3e-4",
        "optim.embed_lr=3e-4",
        "optim.warmup_steps=0",
    ]
    step, state = built(make_config(*optimizer, *extra, "model.param_dtype=bfloat16"), 4)
    full_step, full = built(make_config(*optimizer, *extra), 4)
    full = full._replace(params=train_step.float32(state.params), ema=jax.tree.map(jnp.copy, state.ema))
    dtypes = jax.tree.map(lambda x: x.dtype, state)
    assert {d.name for d in jax.tree.leaves(dtypes.params)} == {"bfloat16"}
    before = jax.device_get(train_step.float32(state.params))
    for _ in range(40):
        state, _ = step(state, split(BATCHES[16][0], 4))
        full, _ = full_step(full, split(BATCHES[16][0], 4))
    assert jax.tree.map(lambda x: x.dtype, state) == dtypes
    for name in ("params", "ema"):
        got, want = (jax.device_get(train_step.float32(getattr(s, name))) for s in (state, full))
        moved, wanted = (
            np.concatenate([(a - b).ravel() for a, b in zip(jax.tree.leaves(x), jax.tree.leaves(before), strict=True)])
            for x in (got, want)
        )
        along = np.dot(moved, wanted) / np.dot(wanted, wanted)
        assert 0.9 < along < 1.1, name  # with rounding to the nearest, most parameters would not move
    scale = state.params["final_norm"]["scale"]
    assert np.abs(np.asarray(train_step.float32(scale)) - before["final_norm"]["scale"]).max() > 0


def test_old_state_is_donated_and_replaced():
    config = make_config(*ADAMW, "optim.ema_decay=0.2")
    step, old = built(config, 4)
    new, _ = step(old, split(BATCHES[16][0], 4))
    assert all(x.is_deleted() for x in jax.tree.leaves(old))
    assert not any(x.is_deleted() for x in jax.tree.leaves(new))
    # Arrays have no device axis, and have the placement that the next step expects.
    again = Placement(config, make(config), jax.devices()[:4]).initial()
    assert jax.tree.map(jnp.shape, new) == jax.tree.map(jnp.shape, again)
    for a, b in zip(jax.tree.leaves(new), jax.tree.leaves(again), strict=True):
        assert a.sharding.is_equivalent_to(b.sharding, a.ndim)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_batch_without_targets_has_a_gradient_of_zero(name: str):
    config = make_config(f"optim.name={name}", "loss.z_loss=1e-3", "optim.weight_decay=0")
    empty = BATCHES[16][0] | {"targets": np.full((16, T), -1, np.int32)}
    result = run_pmap(config, 4, [empty, empty])
    before = jax.device_get(start(config, 2).params)
    jax.tree.map(np.testing.assert_array_equal, result.params, before)
    assert result.losses == [0.0, 0.0] and result.grad_norms == [0.0, 0.0]
    step, state = built(config, 4)
    state, _ = step(state, split(BATCHES[16][0], 4))
    state, _ = step(state, split(BATCHES[16][0], 4))
    kept = jax.device_get(state.loss_mean)
    state, metrics = step(state, split(empty, 4))  # an empty batch has no loss to average
    assert int(kept.count) == 1 and metrics["loss_mean"] == kept.value and state.loss_mean.count == 1


def test_chunked_output_layer_is_the_same_step():
    config = make_config(*ADAMW, "loss.chunk=5")  # does not divide the 32 tokens of a device
    assert_same(run_pmap(config, 4, BATCHES[16]), reference(tuple(ADAMW), 16))


def test_reported_loss_is_the_plain_one_whatever_is_minimized():
    plain = reference(tuple(ADAMW), 16)
    result = run_pmap(make_config(*ADAMW, "loss.label_smoothing=0.2", "loss.z_loss=0.1"), 2, BATCHES[16])
    assert result.losses[0] == pytest.approx(plain.losses[0], rel=RTOL)
    assert abs(result.grad_norms[0] / plain.grad_norms[0] - 1) > 100 * RTOL, "the step minimizes the plain loss"


def test_initial_state_depends_on_the_seed_alone():
    a, b = (train_step.init_state(make_config("seed=3"), make(make_config()), n) for n in (1, 8))
    jax.tree.map(np.testing.assert_array_equal, a, b)
    c = train_step.init_state(make_config("seed=4"), make(make_config()), 1)
    assert gap(jax.device_get(c.params["embed"]), jax.device_get(a.params["embed"])) > 0.1
