"""The training loop. State, step, data and hooks are its arguments."""

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
from jax.sharding import NamedSharding

from jaxlm.host.stop import NEVER, Stop
from jaxlm.train.step import TrainState


class Hook(NamedTuple):
    """What runs after the steps for which it is due, while the loop waits."""

    due: Callable[[int], bool]  # (updates done)
    # (updates done, state). It must not keep the state, which the next step donates.
    act: Callable[[int, TrainState], None]


class Done(NamedTuple):
    """A finished step, whose metrics have arrived."""

    step: int
    metrics: dict[str, jax.Array]  # those of `make_train_step` in step.py
    seconds: float  # since the loop began, without the time of hooks


GROUP, GROUP_BYTES = 16, 2**20  # most batches, and most bytes of them, put on the devices at once


def on_devices(batches: Iterator[Any], count: int, sharding: NamedSharding) -> Iterator[Any]:
    """Yields the next `count` batches, on the devices. Small ones are transferred several at a time: a transfer costs
    the host half a millisecond once the computation has pushed the transfer's code out of the CPU's caches.
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
    hooks: Sequence[Hook],
    stop: Stop = NEVER,
    reached: Callable[[int, str], None] = lambda step, doing: None,
) -> tuple[TrainState, int]:
    """Makes updates start + 1 ... steps, or fewer if `stop` says so. Returns the state and the number of updates done.

    While the devices compute a step, the host prepares the next batch and reports the step before. It does not wait for
    the step just dispatched unless a hook is due, and is never more than one step ahead. `reached` is called with the
    number of updates done and what the loop does next.
    """
    began, in_hooks = time.perf_counter(), 0.0

    def report(step: int, metrics: dict[str, jax.Array]) -> None:
        reached(step, "waiting for the devices")
        jax.block_until_ready(metrics)
        stop.hear(metrics)
        on_step(Done(step, metrics, time.perf_counter() - began - in_hooks))

    ahead = on_devices(batches, steps - start, sharding)
    batch = next(ahead, None)
    pending: tuple[int, dict[str, jax.Array]] | None = None  # the last step, not yet reported
    step = start
    while step < steps and not stop.now():
        state, metrics = train_step(state, stop.tell(batch))  # returns at once; the devices are still at work
        step += 1
        reached(step, "reading the next batch")
        batch = next(ahead, None)
        if pending:
            report(*pending)
        pending = step, metrics
        if due := [hook for hook in hooks if hook.due(step)]:
            report(*pending)
            pending = None
            paused = time.perf_counter()
            for hook in due:
                reached(step, "evaluating, saving or profiling")
                hook.act(step, state)
            in_hooks += time.perf_counter() - paused
    if pending:
        report(*pending)
    return state, step
