"""A device whose copy of the state differs in one bit is found and named, and that state is not saved."""

import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxlm.checkpoint.replicas import Corrupt, Replicas, _hardware, checksum, checksums_of, difference
from jaxlm.config.files import load
from jaxlm.host.exit_codes import exit_code
from jaxlm.model import make_model
from jaxlm.train import step as train_step
from jaxlm.train.placement import Placement
from tests.runs import CHECKPOINT, CONFIG, assert_identical, flags, numbers, run, state_of
from tools import chaos_child

DTYPES = {"float32": np.uint32, "bfloat16": np.uint16, "int32": np.uint32, "float16": np.uint16}


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_checksum_is_a_weighted_sum_of_words(dtype: str):
    x = np.asarray(jnp.asarray(np.random.default_rng(0).normal(size=(3, 5, 7)) * 99, dtype))
    words = x.reshape(-1).view(DTYPES[dtype]).tolist()
    want = sum(w * (i * 2654435761 % 2**32 | 1) for i, w in enumerate(words)) % 2**32
    assert int(checksum(jnp.asarray(x))) == want


def replicated(value: np.ndarray, mesh: Mesh, changed: dict[int, np.ndarray]) -> jax.Array:
    """Returns an array that should be the same on all devices, and differs on the devices in `changed`."""
    copies = [jax.device_put(changed.get(i, value), d) for i, d in enumerate(mesh.devices.flat)]
    return jax.make_array_from_single_device_arrays(value.shape, NamedSharding(mesh, PartitionSpec()), copies)


@pytest.mark.parametrize("bit", [0, 7, 15, 31])
@pytest.mark.parametrize("place", [0, 11])
def test_any_changed_bit_of_one_device_is_found(bit: int, place: int):
    mesh = Mesh(np.array(jax.devices()[:4]), (train_step.AXIS,))
    value = np.arange(12, dtype=np.float32).reshape(3, 4)
    other = value.copy()
    other.view(np.uint32).reshape(-1)[place] ^= np.uint32(1 << bit)
    program = checksums_of(mesh, PartitionSpec())
    good, bad = replicated(value, mesh, {}), replicated(value, mesh, {2: other})
    sums = np.asarray(program({"a": good, "b": bad}))
    assert sums.shape == (4, 2) and len(set(sums[:, 0])) == 1
    assert [s == sums[0, 1] for s in sums[:, 1]] == [True, True, False, True]


@pytest.mark.parametrize(
    "sums, words",
    [
        ([[1, 2], [1, 2]], None),
        ([[1, 2], [1, 3], [1, 2]], "d1 differs from the 2 others in b"),
        ([[0, 2], [1, 3], [1, 3], [0, 3], [1, 3]], "d0 and d3 differ from the 3 others in a and 1 more arrays"),
        ([[1, 2], [1, 3]], "d0 and d1 differ in b"),
        ([[1, 2], [1, 2], [1, 3], [1, 3]], "d0 and d1 and d2 and d3 differ in b"),
    ],
)
def test_the_message_names_the_devices_that_differ(sums: list[list[int]], words: str | None):
    assert difference(["a", "b"], {f"d{i}": s for i, s in enumerate(sums)}) == words


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="a process has all cores")
def test_hosts_with_other_numbers_of_cores_are_not_compared():
    """XLA on CPU splits a product by the number of cores, so the rounding differs."""
    cores = os.sched_getaffinity(0)
    if len(cores) < 2:
        pytest.skip("one core")
    before = _hardware("cpu")
    try:
        os.sched_setaffinity(0, {min(cores)})
        assert _hardware("cpu") != before
    finally:
        os.sched_setaffinity(0, cores)
    assert _hardware("cpu") == before


def test_parts_of_the_model_are_compared_between_replicas():
    """Two replicas of two devices, with half of each matrix on a device."""
    config = load(CONFIG, flags(**{"parallel.devices": 4, "parallel.tensor": 2}))
    placement = Placement(config, make_model(config.model, 64, config.seq_len), jax.devices()[:4])
    state, replicas = placement.initial(), Replicas(config, placement.here)
    replicas.check(1, state)
    table = np.array(state.params["embed"]["embedding"])
    assert table.shape[0] == 4 and np.array_equal(table[0], table[2]) and not np.array_equal(table[0], table[1])
    table[3, 0, 0] += 1
    changed = jax.device_put(table, state.params["embed"]["embedding"].sharding)
    state = state._replace(params=state.params | {"embed": {"embedding": changed}})
    with pytest.raises(Corrupt, match=r"device 1 .* and device 3 .* differ in params/embed/embedding"):
        replicas.check(1, state)


def test_a_run_ends_and_resumes_from_the_previous_checkpoint(
    copy: Path, whole: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    keys: dict[str, Any] = {"steps": CHECKPOINT + 20, "checkpoint.every_steps": 10}
    with monkeypatch.context() as patch:
        patch.setattr(train_step, "pmap_train_step", train_step.pmap_train_step)
        chaos_child.flip(15)
        assert exit_code(lambda: run(copy, **keys)) == 5
    error = capsys.readouterr().err
    assert error.startswith(
        f"jaxlm: step {CHECKPOINT + 20}: device 0 (cpu) of this host and device 1 (cpu) of this host"
    )
    assert error.count("\n") == 1
    assert max(int(p.name) for p in (copy / "checkpoints").iterdir()) == CHECKPOINT + 10
    assert run(copy, **keys) == 0
    assert numbers(copy, CHECKPOINT + 20)[-1]["step"] == CHECKPOINT + 20
    want = {m["step"]: m["loss"] for m in numbers(whole) if "loss" in m}
    found = {m["step"]: m["loss"] for m in numbers(copy) if "loss" in m}
    common = [step for step in found if step in want]
    assert len(common) > 5 and [found[s] for s in common] == [want[s] for s in common]
    assert_identical(state_of(copy, CHECKPOINT), state_of(whole, CHECKPOINT))
