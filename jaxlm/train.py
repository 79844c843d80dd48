"""The training loop. It is given everything that it does not do itself: state, step, data, and hooks."""

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
from jax.sharding import NamedSharding

from jaxlm.step import TrainState

Hook = Callable[[int, TrainState], None]  # (updates done, state); may read the state, which the next step donates


class Diverged(RuntimeError):
    """The loss is not a finite number any more: exit code 3."""


class Done(NamedTuple):
    """A step whose numbers have arrived."""

    step: int
    metrics: dict[str, jax.Array]  # of step.make_train_step
    seconds: float  # since the loop began, without the hooks' time


def train(
    state: TrainState,
    train_step: Callable,
    batches: Iterator[Any],
    *,
    start: int,
    steps: int,
    sharding: NamedSharding,
    on_step: Callable[[Done], None],
    hooks: Sequence[tuple[Callable[[int], bool], Hook]],
    should_stop: Callable[[int], bool],
) -> tuple[TrainState, int]:
    """Runs steps `start` to `steps`, or until `should_stop`; returns the state and the number of updates done.

    While the devices compute step n, the host puts the batch of step n + 1 on them and reports step n - 1; it never
    waits for the step just dispatched, and is never more than one ahead. A hook runs when its condition holds for
    the number of updates done; the loop then waits for it.
    """
    began, in_hooks = time.perf_counter(), 0.0
    pending: tuple[int, dict[str, jax.Array]] | None = None

    def report() -> None:
        nonlocal pending
        if pending is not None:
            step, metrics = pending
            jax.block_until_ready(metrics)
            on_step(Done(step, metrics, time.perf_counter() - began - in_hooks))
        pending = None

    def put() -> Any:
        return jax.device_put(next(batches), sharding)

    batch = put() if start < steps else None
    step = start
    while step < steps and not should_stop(step):
        state, metrics = train_step(state, batch)
        step += 1
        batch = put() if step < steps else None
        report()
        pending = (step, metrics)
        due = [hook for condition, hook in hooks if condition(step)]
        if due:
            report()
            paused = time.perf_counter()
            for hook in due:
                hook(step, state)
            in_hooks += time.perf_counter() - paused
    report()
    return state, step
