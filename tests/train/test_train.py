"""Batches on their way to the devices; the loop is tested with whole runs."""

from collections.abc import Iterator

import jax
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxlm.train.loop import GROUP, GROUP_BYTES, on_devices


@pytest.mark.parametrize("tokens, ahead", [(4, GROUP), (GROUP_BYTES // 4, 1)], ids=["small", "large"])
def test_batches_come_in_order_and_no_more_are_taken_than_asked_for(tokens: int, ahead: int) -> None:
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
