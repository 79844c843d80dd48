"""Compares the guard's decisions with a NumPy reference, and checks that a skipped step leaves no trace."""

from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxlm.checkpoint.reading import Checkpoints
from jaxlm.checkpoint.writing import Saver
from jaxlm.config.files import load
from jaxlm.model import make_model
from jaxlm.sync import Group
from jaxlm.train import guard
from jaxlm.train import step as train_step
from jaxlm.train.placement import Placement
from tests.runs import CONFIG, assert_identical, flags

TARGETS, VOCAB = 4.0, 64


def reference(losses: np.ndarray, norms: np.ndarray, factor: float, skips: bool) -> tuple[list[bool], list[float]]:
    """Returns whether each update is made, and the factor on its gradient, in float64."""
    mean_square, known, updated, scales = 0.0, 0, [], []
    for loss, norm in zip(losses, norms, strict=True):
        finite = bool(np.isfinite(loss) and np.isfinite(norm))
        limit = factor * np.sqrt(mean_square)
        spike = finite and known >= guard.LEAST and 0 < limit < norm
        updated.append(finite and not (spike and skips))
        scales.append(limit / norm if spike else 1.0)
        if finite and norm > 0:
            known += 1
            weight = max(1 / known, 1 - guard.DECAY)
            mean_square += weight * (float(limit if spike else norm) ** 2 - mean_square)
    return updated, scales


def judge_all(losses: Any, norms: Any, **keys: Any) -> tuple[list[bool], list[float], list[guard.Guard]]:
    c = load(CONFIG, flags(**{f"optim.{k}": v for k, v in keys.items()})).optim

    def judge(g: guard.Guard, loss: jax.Array, norm: jax.Array) -> Any:
        numbers = guard.Numbers(loss * TARGETS, norm, g.mean_square, g.first_loss)
        return guard.judge(g, numbers, jnp.float32(TARGETS), c, VOCAB)

    judge, state = jax.jit(judge), guard.init()
    updated, scales, states = [], [], []
    for loss, norm in zip(losses, norms, strict=True):
        good, scale, state = judge(state, np.float32(loss), np.float32(norm))
        updated.append(bool(good))
        scales.append(float(scale))
        states.append(state)
    return updated, scales, states


@pytest.mark.parametrize("factor", [0.0, 3.0])
@pytest.mark.parametrize("on_spike", ["scale", "skip"])
def test_judgements(factor: float, on_spike: str):
    rng = np.random.default_rng(0)
    losses, norms = (np.exp(rng.normal(size=300) * 0.2) for _ in range(2))
    losses[[5, 77]], norms[[9, 78, 200]] = [np.nan, np.inf], [np.inf, np.nan, np.nan]
    losses[[3, 100, 150]] *= 10  # high losses are not spikes
    norms[220:] *= 1e-3
    norms[[4, 101, 102, 210, 290]] *= [20, 20, 1e12, 20, 1e5]
    norms[[0, 20, 21]] = 0  # batches without targets
    want, wanted = reference(losses, norms, factor, on_spike == "skip")
    updated, scales, states = judge_all(losses, norms, spike_factor=factor, on_spike=on_spike)
    assert updated == want
    np.testing.assert_allclose(scales, wanted, rtol=1e-5)
    spikes = 4 if factor else 0  # the one in step 4 comes before enough norms are known
    assert int(states[-1].spikes) == sum(np.array(scales) < 1) == spikes
    assert int(states[-1].skipped) == updated.count(False) == 5 + (spikes if on_spike == "skip" else 0)
    assert max(int(g.in_row) for g in states) == 2
    assert int(states[-1].in_row) == 0


@pytest.mark.parametrize("times", [15.0, 1e4])
def test_a_norm_that_has_changed_for_good_soon_counts_as_usual(times: float):
    """For example, when a model begins to learn after a plateau. No batch is dropped meanwhile."""
    norms = np.concatenate([np.full(100, 0.1), np.full(100, 0.1 * times)])
    updated, scales, _ = judge_all(np.ones(200), norms, spike_factor=10.0)
    assert all(updated)
    scaled = np.flatnonzero(np.array(scales) < 1)
    assert scaled.min() >= 100 and scaled.max() < 112
    assert np.array(scales)[scaled].min() > 9.9 / times


def test_large_gradients_that_recur_are_not_scaled_down():
    """For example, when one batch in twenty has a wrong label and the model has memorized the others."""
    norms = np.where(np.random.default_rng(0).random(2000) < 0.05, 1.0, 1e-3)
    _, scales, _ = judge_all(np.ones(2000), norms, spike_factor=10.0)
    surprises = np.array(scales)[200:][norms[200:] == 1]
    assert len(surprises) > 60 and (surprises == 1).mean() > 0.9


def test_losses_that_stay_high_are_counted():
    """High is more than twice the loss of an untrained model, or of the first step if that is higher."""
    usual = 2 * np.log(VOCAB)
    losses = [1.0, *[usual * 1.01] * 3, usual * 0.99, usual * 1.01, np.nan, np.inf]
    assert [int(g.high) for g in judge_all(losses, np.ones(8))[2]] == [0, 1, 2, 3, 0, 1, 2, 3]
    losses = [usual * 0.9, usual * 1.7, usual * 1.9]
    assert [int(g.high) for g in judge_all(losses, np.ones(3))[2]] == [0, 0, 1]


def test_devices_that_round_differently_decide_alike():
    """Each device has its own rounding of the norm and of the guard's state, close to the limit."""
    c, rng = load(CONFIG, flags(**{"optim.on_spike": "skip"})).optim, np.random.default_rng(0)
    group = Group("devices", 4)

    def one(state: guard.Guard, norm: jax.Array) -> Any:
        numbers = guard.agree(state, jnp.float32(3), norm, group)
        return guard.judge(state, numbers, jnp.float32(1), c, VOCAB)

    judge = jax.jit(jax.vmap(one, axis_name="devices"))

    def around(x: float) -> np.ndarray:
        return np.float32(x) * (1 + rng.integers(-2, 3, 4) * np.finfo(np.float32).eps).astype(np.float32)

    apart = []
    for _ in range(50):
        state = jax.tree.map(lambda x: jnp.stack([x] * 4), guard.init())
        state = state._replace(mean_square=around(0.3), known=jnp.full(4, guard.LEAST), first_loss=around(3))
        norm = around(c.spike_factor * np.sqrt(0.3))
        good, _, after = judge(state, norm)
        apart.append(len(set(norm > np.float32(c.spike_factor) * np.sqrt(state.mean_square))) > 1)
        for x in (good, after.mean_square, after.first_loss, after.skipped, after.spikes, after.in_row):
            assert len(set(np.asarray(x).tolist())) == 1
    assert sum(apart) > 5  # without agreement, devices would have decided differently


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("zero", [0, 1])
def test_a_skipped_step_changes_nothing_but_the_counts(optimizer: str, zero: int):
    """The next step is the one that would have followed without it, at the learning rate of its own number."""
    keys = {
        "optim.name": optimizer,
        "parallel.zero": zero,
        "parallel.reduce": "int8",
        "optim.schedule": "linear",
        "model.dropout": 0.0,
    }
    config = load(CONFIG, flags(**keys))
    devices, model = jax.devices()[:2], make_model(config.model, 64, config.seq_len)
    placement = Placement(config, model, devices)
    one = train_step.make_train_step(config, model, devices)
    step = train_step.pmap_train_step(config, one, devices)
    rng = np.random.default_rng(0)
    batch = {k: rng.integers(0, 64, (2, 4, 16)).astype(np.int32) for k in ("inputs", "targets")}

    def with_nan(state: train_step.TrainState) -> train_step.TrainState:
        return state._replace(
            params=state.params | {"embed": {"embedding": state.params["embed"]["embedding"] * np.nan}}
        )

    before = jax.device_get(step(placement.initial(), batch)[0])
    bad = placement.place(with_nan(before))
    after, metrics = jax.device_get(step(bad, batch))
    assert (int(metrics["skipped"]), int(metrics["in_row"]), int(after.step)) == (1, 1, 2)
    assert not np.isfinite(metrics["loss"])
    assert_identical(after.params, with_nan(before).params)
    assert_identical(after.sync, before.sync)
    assert_identical(after.ema, before.ema)

    def moments(opt_state: object) -> object:
        def is_count(x: object) -> bool:
            return isinstance(x, optax.ScaleByScheduleState)

        return jax.tree.map(lambda x: None if is_count(x) else x, opt_state, is_leaf=is_count)

    assert_identical(moments(after.opt_state), moments(before.opt_state))
    # With good parameters again, it continues like a state whose count of steps was set forward.
    forward = before._replace(
        step=before.step + 1, opt_state=after.opt_state, guard=after.guard._replace(in_row=np.int32(0))
    )
    want, wanted = jax.device_get(step(placement.place(forward), batch))
    got, metrics = jax.device_get(step(placement.place(after._replace(params=before.params)), batch))
    assert_identical(got.params, want.params)
    assert int(metrics["in_row"]) == 0 and float(metrics["lr"]) == float(wanted["lr"])
    assert not np.array_equal(got.params["embed"]["embedding"], before.params["embed"]["embedding"])


def test_the_step_passes_on_that_a_process_is_asked_to_stop():
    config = load(CONFIG, flags())
    devices, model = jax.devices()[:2], make_model(config.model, 64, config.seq_len)
    step = train_step.pmap_train_step(config, train_step.make_train_step(config, model, devices), devices)
    batch = {k: np.zeros((2, 4, 16), np.int32) for k in ("inputs", "targets")}
    placement = Placement(config, model, devices)
    assert "stop" not in step(placement.initial(), batch)[1]
    for asked in ([0, 0], [0, 1], [1, 1]):
        found = step(placement.initial(), batch | {"stop": np.array(asked, np.float32)})[1]["stop"]
        assert (float(found) > 0) == any(asked)


def test_an_older_checkpoint_keeps_its_count_of_skipped_steps(tmp_path: Path):
    config = load(CONFIG, flags())
    placement = Placement(config, make_model(config.model, 64, config.seq_len), jax.devices()[:2])
    fresh = placement.initial()
    window, count = jnp.ones(64, jnp.float32), jnp.int32(7)
    older = guard.OldGuard(*jax.device_put((window, window, count, count), fresh.guard.known.sharding))
    saver = Saver(tmp_path, config.checkpoint)
    saver.save(3, fresh._replace(guard=cast(Any, older)))
    saver.close()
    checkpoints = Checkpoints(tmp_path)
    found = checkpoints.restore(3, placement, fresh)
    checkpoints.close()
    assert_identical(jax.device_get(found.guard), jax.device_get(fresh.guard._replace(skipped=count)))
