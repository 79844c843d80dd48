"""Which updates are made, against a reference in NumPy; and that a skipped one leaves no trace in the step."""

import jax
import numpy as np
import optax
import pytest

from jaxlm import guard
from jaxlm import step as steps
from jaxlm.cli import load
from jaxlm.model import make_model
from jaxlm.placement import Placement
from tests.runs import CONFIG, assert_identical, flags


def reference(losses: np.ndarray, norms: np.ndarray, factor: float) -> list[bool]:
    """Good or not, one after the other; a batch without targets, whose norm is 0, does not say what is usual."""
    good: list[int] = []
    found = []
    for i, (loss, norm) in enumerate(zip(losses, norms, strict=True)):
        window = good[-guard.WINDOW :]
        ok = bool(np.isfinite(loss) and np.isfinite(norm))
        if factor and window:
            ok = ok and loss <= factor * max(np.median(losses[window]), guard.FLOOR)
        if factor and len(window) >= guard.LEAST and np.median(losses[window]) >= guard.FLOOR:
            ok = ok and norm <= factor * np.median(norms[window])
        found.append(bool(ok))
        good += [i] * bool(ok and norm > 0)
    return found


@pytest.mark.parametrize("factor", [0.0, 3.0])
def test_judgements(factor: float):
    rng = np.random.default_rng(0)
    losses, norms = (np.exp(rng.normal(size=300) * 0.2).astype(np.float32) for _ in range(2))
    losses[[5, 77]], norms[[9, 78, 200]] = [np.nan, np.inf], [np.inf, np.nan, np.nan]
    losses[[3, 100, 150, 151, 152]] *= 10
    losses[220:] *= 1e-3
    losses[260] *= 50  # of next to nothing
    losses[[0, 20, 21]] = norms[[0, 20, 21]] = 0
    norms[[4, 101, 210, 290]] *= 10  # the last where all is learned by heart
    want = reference(losses, norms, factor)
    judge = jax.jit(lambda g, a, b: guard.judge(g, a, b, factor))
    state, got, rows = guard.init(), [], []
    for loss, norm in zip(losses, norms, strict=True):
        good, state = judge(state, loss, norm)
        got.append(bool(good))
        rows.append(int(state.in_row))
    assert got == want
    # Norms of before there was enough to compare with pass.
    assert want.count(False) == (5 if not factor else 5 + 5 + 2)
    assert int(state.skipped) == want.count(False) and max(rows[150:153]) == (3 if factor else 0)
    assert rows[-1] == 0


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("zero", [0, 1])
def test_a_skipped_step_changes_nothing_but_the_counts(optimizer: str, zero: int):
    """And the next one is what it would have been, at the learning rate of its own step."""
    keys = {"optim.name": optimizer, "parallel.zero": zero, "parallel.reduce": "int8", "optim.schedule": "linear",
            "model.dropout": 0.0}  # fmt: skip
    config = load(CONFIG, flags(**keys))
    devices, model = jax.devices()[:2], make_model(config.model, 64, config.seq_len)
    placement = Placement(config, devices)
    one = steps.make_train_step(config, model, devices)
    step = steps.pmap_train_step(config, one, devices)
    rng = np.random.default_rng(0)
    batch = {k: rng.integers(0, 64, (2, 4, 16)).astype(np.int32) for k in ("inputs", "targets")}

    def with_nan(state: steps.TrainState) -> steps.TrainState:
        return state._replace(
            params=state.params | {"embed": {"embedding": state.params["embed"]["embedding"] * np.nan}}
        )

    before = jax.device_get(step(placement.initial(model), batch)[0])
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
    # With its good parameters again it goes on, as one whose count of steps was set forward.
    forward = before._replace(
        step=before.step + 1, opt_state=after.opt_state, guard=after.guard._replace(in_row=np.int32(0))
    )
    want, wanted = jax.device_get(step(placement.place(forward), batch))
    got, metrics = jax.device_get(step(placement.place(after._replace(params=before.params)), batch))
    assert_identical(got.params, want.params)
    assert int(metrics["in_row"]) == 0 and float(metrics["lr"]) == float(wanted["lr"])
    assert not np.array_equal(got.params["embed"]["embedding"], before.params["embed"]["embedding"])


def test_whether_a_process_is_to_stop_goes_through_the_step():
    config = load(CONFIG, flags())
    devices, model = jax.devices()[:2], make_model(config.model, 64, config.seq_len)
    step = steps.pmap_train_step(config, steps.make_train_step(config, model, devices), devices)
    batch = {k: np.zeros((2, 4, 16), np.int32) for k in ("inputs", "targets")}
    placement = Placement(config, devices)
    assert "stop" not in step(placement.initial(model), batch)[1]
    for asked in ([0, 0], [0, 1], [1, 1]):
        found = step(placement.initial(model), batch | {"stop": np.array(asked, np.float32)})[1]["stop"]
        assert (float(found) > 0) == any(asked)
