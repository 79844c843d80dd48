"""What a run does when training goes wrong: it returns to a good checkpoint and leaves out the bad batches."""

import dataclasses
import json
from typing import Any

import jax
import jax.numpy as jnp

from jaxlm import data
from jaxlm.checkpoint import rollback
from jaxlm.checkpoint.reading import CheckpointError, Checkpoints
from jaxlm.checkpoint.rollback import Diverged, Return, Trouble
from jaxlm.checkpoint.start_from import opened
from jaxlm.checkpoint.writing import Saver
from jaxlm.host import distributed
from jaxlm.run.begin import Parts, on_first, restart_counts, train_order
from jaxlm.train.step import TrainState


@jax.jit
def all_finite(tree: Any) -> jax.Array:
    return jnp.stack([jnp.isfinite(x).all() for x in jax.tree.leaves(tree)]).all()


def bad_since(parts: Parts, step: int, why: str) -> Trouble:
    """The error for a bad state; every step since the last checkpoint is suspect."""
    return Trouble(min((parts.saver.wait() or 0) + 1, step), step, why)


def go_back(parts: Parts, trouble: Trouble) -> tuple[Parts, TrainState, int]:
    """Restores the last good checkpoint, removes later ones, and leaves out the batches of the bad steps.

    Returns:
      The parts, the state to continue from, and the number of its updates.

    Raises:
      Diverged: the run has already gone back `optim.max_returns` times within the last rollback.SOON steps.
      CheckpointError: no checkpoint is whole.
    """
    c, workdir, returns = parts.config, parts.workdir, parts.returns
    with opened(workdir) as checkpoints:
        whole = _whole(checkpoints, len(returns)) if checkpoints else []
        if checkpoints is None or not whole:
            raise CheckpointError(f"{workdir / 'checkpoints'}: no whole checkpoint to go back to; {trouble.why}")
        to = rollback.target(whole, trouble.first, returns)
        first, last = bad_batches(trouble, to, parts.order)
        recent = rollback.recent(returns, to)
        if len(recent) >= c.optim.max_returns:
            raise _diverged(parts, trouble, [*((r.first, r.last) for r in recent), (first, last)], max(whole))
        state = checkpoints.restore(to, parts.placement, parts.placement.initial())
        later = [step for step in checkpoints.steps() if step > to]
    # The first return may have met a passing fault. If another one follows soon, the rates are probably too high.
    returns = [*returns, Return(to, first, last, trouble.why, c.optim.return_lr if recent else 1.0)]

    def record() -> None:
        rollback.remove(workdir / "checkpoints", later)
        rollback.write(workdir, returns)

    on_first(record)
    scale = rollback.lr_scale(returns)
    rates = "the same learning rates" if scale == 1 else f"{scale:.3g} times the learning rates"
    parts.reporter.say(
        f"goes back to step {to}, without batches {first} to {last}, since {trouble.why}"
        f" (return {len(recent) + 1} of {c.optim.max_returns}); warms up again to"
        f" {rates}"
    )
    saver = Saver(workdir, c.checkpoint, parts.reporter.say)
    order = train_order(parts.corpus, c, returns, parts.order.version)
    return dataclasses.replace(parts, saver=saver, order=order, returns=returns), restart_counts(state), to


def bad_batches(trouble: Trouble, to: int, order: data.TrainOrder) -> tuple[int, int]:
    """Numbers of the first and the last batch to leave out when the run goes back to step `to`."""
    first = max(trouble.first, to + 1)  # the checkpoint has used up the batches before it
    last = max(trouble.last, first)  # if the only checkpoint is that of the bad step, the next batch is left out
    return int(order.batch_number(first)), int(order.batch_number(last))


def _diverged(parts: Parts, trouble: Trouble, bad: list[tuple[int, int]], newest: int) -> Diverged:
    batches = ", ".join(f"{first} to {last}" for first, last in bad)
    return Diverged(
        f"training diverged in step {trouble.last}: {trouble.why}; it went back {len(bad) - 1} times"
        f" (optim.max_returns), in the end with {rollback.lr_scale(parts.returns):.3g} times the learning rates; bad"
        f" were batches {batches}; the newest checkpoint is of step {newest}; a lower optim.lr, more"
        " optim.warmup_steps, a smaller optim.clip_norm or optim.spike_factor, or model.qk_norm=true may help"
    )


def _whole(checkpoints: Checkpoints, time: int) -> list[int]:
    """Steps of the whole checkpoints, as the first process finds them. `time` counts the calls of a run."""

    def find() -> str:
        return json.dumps([step for step in checkpoints.steps() if checkpoints.damage(step) is None])

    return json.loads(distributed.from_first(f"the whole checkpoints ({time})", find))
