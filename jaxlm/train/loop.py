"""The training loop. State, step, data and hooks are its arguments."""

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
from jax.sharding import NamedSharding

from jaxlm.host.stop import NEVER, Stop
from jaxlm.train.step import TrainState

Hook = Callable[[int, TrainState], None]  # (updates done, state); must not keep the state, which the next step donates


class Done(NamedTuple):
    """A finished step, whose metrics have arrived."""

    step: int
    metrics: dict[str, jax.Array]  # from train_step.make_train_step
    seconds: float  # since the loop began, without the time of hooks


GROUP, GROUP_BYTES = 16, 2**20  # most batches, and most bytes of them, put on the devices at once


def on_devices(batches: Iterator[Any], count: int, sharding: NamedSharding) -> Iterator[Any]:
    """Yields the next `count` batches, on the devices. Small ones are transferred several at a time, because each call
    costs the host half a millisecond when a computation has evicted its code from the caches.
    """
    size = 1
    while group := list(itertools.islice(batches, min(size, count))):
        yield from jax.device_put(group, sharding)
        count -= len(group)
        size = max(1, min(GROUP, GROUP_BYTES // sum(x.nbytes for x in jax.tree.leaves(group[0]))))


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
    stop: Stop = NEVER,
    at: Callable[[int, str], None] = lambda step, doing: None,
) -> tuple[TrainState, int]:
    """Runs steps `start` to `steps`, or until `stop`. Returns the state and the number of updates done.

    While the devices compute step n, the host prepares the batch of step n + 1 and reports step n - 1. It never waits
    for the step just dispatched, and is never more than one step ahead. A hook runs if its condition holds for the
    number of updates done; the loop waits for it. `at` is called with the step and what the loop does.
    """
    began, in_hooks = time.perf_counter(), 0.0
    pending: tuple[int, dict[str, jax.Array]] | None = None

    def report() -> None:
        nonlocal pending
        if pending is not None:
            step, metrics = pending
            at(step, "waiting for the devices")
            jax.block_until_ready(metrics)
            stop.hear(metrics)
            on_step(Done(step, metrics, time.perf_counter() - began - in_hooks))
        pending = None

    ahead = on_devices(batches, steps - start, sharding)
    batch = next(ahead, None)
    step = start
    while step < steps and not stop.now():
        state, metrics = train_step(state, stop.tell(batch))
        step += 1
        at(step, "reading the next batch")
        batch = next(ahead, None)
        report()
        pending = (step, metrics)
        due = [hook for condition, hook in hooks if condition(step)]
        if due:
            report()
            paused = time.perf_counter()
            for hook in due:
                at(step, "beside the steps")
                hook(step, state)
            in_hooks += time.perf_counter() - paused
    report()
    return state, step
