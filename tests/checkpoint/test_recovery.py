"""After bad batches, a run goes back and continues like a run without these batches, or ends if it cannot recover."""

import re
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from jaxlm import data
from jaxlm.checkpoint import rollback
from jaxlm.checkpoint.reading import Checkpoints
from jaxlm.config import UserError
from jaxlm.config.files import load
from jaxlm.data.order import TrainOrder
from jaxlm.host.exit_codes import exit_code
from jaxlm.run import evaluation
from jaxlm.train import backward
from jaxlm.train.schedules import LrHistory, make_schedule
from tests.runs import CHECKPOINT, CONFIG, assert_identical, flags, lines, numbers, run, state_of
from tools import chaos_child


@pytest.fixture
def poison(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes the loss of some batches NaN."""
    monkeypatch.setattr(TrainOrder, "batches", TrainOrder.batches)
    monkeypatch.setattr(backward, "output_loss", backward.output_loss)
    return chaos_child.poison


@pytest.mark.parametrize("seed", range(20))
def test_left_out_batches_are_missing_from_the_order(seed: int):
    """Step n trains on the n-th of the remaining batches."""
    rng = np.random.default_rng(seed)
    config = load(CONFIG, flags())
    corpus = data.prepare(config)
    starts = rng.integers(1, 60, rng.integers(0, 5))
    left_out = [(int(a), int(a + rng.integers(0, 6))) for a in starts]
    gone = {n for a, b in left_out for n in range(a, b + 1)}
    order, every = TrainOrder(corpus, config, left_out), TrainOrder(corpus, config)
    want = [n for n in range(1, 200) if n not in gone][:60]
    assert [int(order.batch_number(step)) for step in range(1, 61)] == want
    got = order.batches(0, 60)["inputs"]
    np.testing.assert_array_equal(got, every.batches(0, 200)["inputs"][np.array(want) - 1])
    np.testing.assert_array_equal(order.batches(7, 9)["inputs"], got[7:16])  # from any step
    # Too many to count one by one.
    assert int(TrainOrder(corpus, config, [*left_out, (70, 2**31 - 1)]).batch_number(9999)) > 2**31
    assert order.consumed(60) == every.consumed(want[-1]) and order.consumed(0) == every.consumed(0)


@pytest.mark.ci
def test_the_only_kept_checkpoint_may_lie_within_the_bad_steps(poison: Any, copy: Path):
    """Batches that were skipped before it are used up already, so the return does not leave them out."""
    keys = {
        "steps": CHECKPOINT + 20,
        "checkpoint.every_steps": 5,
        "checkpoint.keep": 1,
        "checkpoint.keep_best": 0,
        "eval.every_steps": 0,
        "optim.max_skipped": 5,
    }
    poison(CHECKPOINT + 8, CHECKPOINT + 12)
    assert run(copy, **keys) == 0
    returns = [(r.to, r.first, r.last) for r in rollback.read(copy)]
    assert returns == [(CHECKPOINT + 10, CHECKPOINT + 11, CHECKPOINT + 12)]
    assert [m for m in lines(copy) if "loss" in m][-1]["skipped"] == 3  # of batches 108 to 110


@pytest.mark.parametrize(
    "steps, first, before, want",
    [
        ([0, 50, 100], 101, [], 100),
        ([0, 50, 100], 100, [], 50),  # a checkpoint of the bad step itself does not count
        ([50, 100], 30, [], 50),
        ([0, 50, 100], 101, [100], 50),  # no step was good after going back to it
        ([0, 50, 100], 102, [100], 100),
        ([100], 101, [100], 100),
    ],
)
def test_the_checkpoint_to_go_back_to(steps: list[int], first: int, before: list[int], want: int):
    returns = [rollback.Return(to, to + 1, to + 5, "") for to in before]
    assert rollback.target(steps, first, returns) == want


def test_bad_steps_are_skipped_and_counted(poison: Any, copy: Path, capsys: pytest.CaptureFixture[str]):
    poison(CHECKPOINT + 3, CHECKPOINT + 4)
    assert run(copy, steps=CHECKPOINT + 12, log__every_steps=4) == 0
    said = [line for line in capsys.readouterr().out.splitlines() if " skipped, " in line]
    assert [line.split(",")[0].split(" ", 2)[2] for line in said] == ["step 103 skipped", "step 104 skipped"]
    assert "with batch 103: the loss is nan" in said[0]
    found = {
        m["step"]: (m["skipped"], m["loss"] is None) for m in lines(copy) if "loss" in m and m["step"] > CHECKPOINT
    }
    assert found == {104: (2, True), 108: (2, False), 112: (2, False)}
    assert not (copy / rollback.NAME).exists()


def test_after_many_bad_steps_in_a_row_the_run_goes_back_and_leaves_their_batches_out(
    poison: Any, short: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    bad, upto = (CHECKPOINT + 11, CHECKPOINT + 13), CHECKPOINT + 30
    keys = {"steps": upto, "optim.max_skipped": 3, "checkpoint.every_steps": 12, "eval.every_steps": 10}
    poisoned = Path(shutil.copytree(short, tmp_path / "poisoned"))
    poison(*bad)
    assert run(poisoned, **keys) == 0
    said = capsys.readouterr().out
    returns = rollback.read(poisoned)
    assert [(r.to, r.first, r.last) for r in returns] == [(108, *bad)]
    assert (
        "goes back to step 108, without batches 111 to 113" in said
        and "warms up again to the same learning rates" in said
    )
    # A run from step 108 that never reads the bad batches.
    plain = Path(shutil.copytree(poisoned, tmp_path / "plain"))
    for step in (120, upto):
        shutil.rmtree(plain / "checkpoints" / str(step))
    assert run(plain, **keys) == 0
    assert numbers(poisoned) == numbers(plain) and all(m.get("loss", 0) is not None for m in lines(poisoned))
    assert_identical(state_of(poisoned, upto), state_of(plain, upto))
    epochs = {m["step"]: m["epochs"] for m in lines(plain) if "epochs" in m}
    assert epochs[upto] == pytest.approx(epochs[CHECKPOINT] * (upto + 3) / CHECKPOINT)
    # Impossible returns are refused, even if the run is finished.
    (plain / rollback.NAME).write_text('[{"to": 5, "batches": [3, 4], "why": ""}]')
    with pytest.raises(UserError, match=rollback.NAME):
        run(plain, **keys)


@pytest.mark.ci
def test_a_learning_rate_of_a_million_ends_with_3(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    keys = {"optim.lr": 1e6, "steps": 60, "checkpoint.every_steps": 2, "eval.every_steps": 0, "optim.max_returns": 2}
    assert exit_code(lambda: run(tmp_path / "run", **keys)) == 3
    error = capsys.readouterr().err
    went_back = re.search(r"went back (\d) times", error)
    assert error.count("\n") == 1 and "diverged" in error and went_back and int(went_back[1]) >= 2
    returns = rollback.read(tmp_path / "run")  # a second return soon after the first lowers the rates
    assert [r.lr for r in returns[:2]] == [1.0, 0.5]
    assert sum(f"{r.first} to {r.last}" in error for r in returns) == int(went_back[1])
    checkpoints = Checkpoints(tmp_path / "run")
    for step in checkpoints.steps():
        assert all(np.isfinite(x).all() for x in jax.tree.leaves(checkpoints.restore_params(step, ema=False)))
    checkpoints.close()
    # The same command makes no more attempts unless more returns are allowed.
    assert exit_code(lambda: run(tmp_path / "run", **keys)) == 3
    assert rollback.read(tmp_path / "run") == returns


def test_the_only_checkpoint_may_be_that_of_the_bad_step(copy: Path, monkeypatch: pytest.MonkeyPatch):
    """If the only checkpoint precedes an evaluation that gives NaN, the run continues from it, and resumes later."""
    shutil.rmtree(copy / "checkpoints/0")
    found = [line for line in (copy / "metrics.jsonl").read_text().splitlines(True) if "eval_loss" not in line]
    (copy / "metrics.jsonl").write_text("".join(found))
    evaluate, calls = evaluation.evaluate, 0

    def first_is_none(*args: Any) -> dict[str, Any]:
        nonlocal calls
        calls += 1
        return evaluate(*args) | ({"eval_loss": float("nan")} if calls == 1 else {})

    monkeypatch.setattr(evaluation, "evaluate", first_is_none)
    assert run(copy, **{"steps": CHECKPOINT + 2, "eval.every_steps": 50}) == 0
    returns = [(r.to, r.first, r.last) for r in rollback.read(copy)]
    assert returns == [(CHECKPOINT, CHECKPOINT + 1, CHECKPOINT + 1)]
    assert run(copy, **{"steps": CHECKPOINT + 3, "eval.every_steps": 50}) == 0


def test_returns_of_a_run_without_checkpoints_are_discarded(tmp_path: Path):
    assert run(tmp_path / "run", steps=1) == 0
    shutil.rmtree(tmp_path / "run/checkpoints")
    rollback.write(tmp_path / "run", [rollback.Return(0, 1, 1, "")])
    assert run(tmp_path / "run", steps=1) == 0
    assert not (tmp_path / "run" / rollback.NAME).exists()


def test_learning_rates_after_returns():
    """Each return starts a new warmup, and its factor multiplies those of earlier returns."""
    c = load(CONFIG, flags(**{"optim.schedule": "constant", "optim.warmup_steps": 20, "optim.lr": 0.5})).optim
    schedule = make_schedule(
        c, 1000, "lr", LrHistory(None, rollback.lr_cuts([rollback.Return(100, 101, 105, "", lr) for lr in (1, 0.5)]))
    )
    got = [float(schedule(n)) for n in (99, 100, 109, 119, 500)]
    np.testing.assert_allclose(got, [0.5, 0.25 / 20, 0.25 * 10 / 20, 0.25, 0.25], rtol=1e-6)


def test_a_return_to_an_earlier_checkpoint_applies_later_cuts_at_once():
    """From there on, all factors apply, and the rates do not warm up again at the checkpoint of an earlier return."""
    c = load(CONFIG, flags(**{"optim.schedule": "constant", "optim.warmup_steps": 20, "optim.lr": 0.5})).optim
    returns = [rollback.Return(to, to + 1, to + 5, "", lr) for to, lr in ((100, 1), (100, 0.5), (50, 0.5), (300, 1))]
    schedule = make_schedule(c, 1000, "lr", LrHistory(None, rollback.lr_cuts(returns)))
    left = 0.5 * rollback.lr_scale(returns)
    got = [float(schedule(n)) for n in (49, 50, 69, 99, 100, 299, 300, 319)]
    np.testing.assert_allclose(got, [0.5, left / 20, left, left, left, left, left / 20, left], rtol=1e-6)


NO_RETURNS = [
    "",
    "{",
    "[1]",
    '[{"to": 1}]',
    '[{"to": 1, "batches": [], "why": ""}]',
    "[" * 9999,
    '[{"to": "a", "batches": [1, 2], "why": ""}]',
    '{"to": 1}',
    '[{"to": 1, "batches": [2, 9.5], "why": ""}]',
    '[{"to": 1, "batches": [2, 99999999999], "why": ""}]',
]


@pytest.mark.parametrize("content", NO_RETURNS)
def test_an_invalid_list_of_returns_is_refused(content: str, tmp_path: Path):
    (tmp_path / rollback.NAME).write_text(content)
    with pytest.raises(UserError, match=rollback.NAME):
        rollback.read(tmp_path)


def test_a_skipped_spike_is_reported_as_a_spike(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    keys = {"steps": 40, "optim.on_spike": "skip", "optim.spike_factor": 1.01, "optim.max_skipped": 40}
    assert run(tmp_path / "run", **keys, **{"eval.every_steps": 0}) == 0
    shown = [line for line in capsys.readouterr().out.splitlines() if " skipped, with batch " in line]
    assert shown and all("a spike (optim.spike_factor), which optim.on_spike=skip leaves out" in line for line in shown)
