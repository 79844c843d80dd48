"""The loop with a step that only counts, and batches on their way to the devices. Whole runs test it, too."""

from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxlm.train.loop import GROUP, GROUP_BYTES, Done, Hook, on_devices, train


def test_the_loop_reports_the_step_before_and_waits_only_for_hooks() -> None:
    """Dispatches step n before it reports step n - 1, runs hooks on the state of their step, and reports each step."""
    events: list[str] = []

    def step(state: int, batch: dict[str, jax.Array]) -> tuple[int, dict[str, jax.Array]]:
        events.append(f"step {state + 1} on batch {int(batch['inputs'][0, 0])}")
        return state + 1, {"loss": batch["inputs"][0, 0]}

    def on_step(done: Done) -> None:
        assert int(done.metrics["loss"]) == done.step
        events.append(f"report {done.step}")

    sharding = NamedSharding(Mesh(np.array(jax.devices()[:1]), ("devices",)), PartitionSpec("devices"))
    batches = ({"inputs": np.full((1, 1), n, np.int32)} for n in range(3, 10))
    hook = Hook(lambda step: step == 4, lambda step, state: events.append(f"hook {step} with state {state}"))
    loop: Any = train  # the state is a number here
    state, done = loop(2, step, batches, start=2, steps=6, sharding=sharding, on_step=on_step, hooks=[hook])
    assert state == done == 6
    assert events == [
        "step 3 on batch 3",
        "step 4 on batch 4",
        "report 3",
        "report 4",
        "hook 4 with state 4",
        "step 5 on batch 5",
        "step 6 on batch 6",
        "report 5",
        "report 6",
    ]


@pytest.mark.parametrize("tokens, ahead", [(4, GROUP), (GROUP_BYTES // 4, 1)], ids=["small", "large"])
def test_batches_come_in_order_and_no_more_are_taken_than_needed(tokens: int, ahead: int) -> None:
    taken = 0

    def batches() -> Iterator[dict[str, np.ndarray]]:
        nonlocal taken
        while True:
            taken += 1
            yield {"inputs": np.full((2, tokens // 2), taken - 1, np.int32)}

    sharding = NamedSharding(Mesh(np.array(jax.devices()[:2]), ("devices",)), PartitionSpec("devices"))
    count = 2 * GROUP + 5
    for n, batch in enumerate(on_devices(batches(), count, sharding)):
        assert batch["inputs"].sharding == sharding
        np.testing.assert_array_equal(batch["inputs"], n)
        assert n < taken <= min(n + ahead, count)
    assert n == count - 1 and taken == count
