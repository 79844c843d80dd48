"""ZeRO-2 and 3: 16 bits, and memory by the compiler's analysis. test_parallel.py compares their numbers in float32."""

import jax
import numpy as np
import pytest

from jaxlm.model import make_model
from jaxlm.plan.compiled import compile_step
from jaxlm.train.placement import Placement
from tests.grids import RTOL, VOCAB, gap, held_bytes, make_config, train


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_in_16_bits_gathered_matrices_compute_the_same(dtype: str):
    """Matrices are gathered in the dtype of the computation, with float16 in float32."""
    keys = ("optim.name=adamw", f"model.dtype={dtype}", "model.remat=elementwise", "model.param_dtype=float32")
    got, want = (train(2, *keys, f"parallel.zero={zero}", steps_done=2) for zero in (3, 1))
    np.testing.assert_allclose(got.metrics, want.metrics, rtol=RTOL)
    assert gap(got.params, want.params) < 10 * RTOL


def test_bfloat16_parameters_in_parts_differ_only_by_the_direction_of_their_rounding():
    keys = ("optim.name=sgd", "model.param_dtype=bfloat16", "optim.lr=0.1", "optim.momentum=0", "optim.clip_norm=0")
    got, want = (train(4, *keys, f"parallel.zero={zero}", steps_done=1) for zero in (3, 0))
    differ, count = 0, 0
    for a, b in zip(*map(jax.tree.leaves, (got.params, want.params)), strict=True):
        assert a.dtype == "bfloat16"
        a, b = np.float32(a), np.float32(b)
        np.testing.assert_allclose(a, b, rtol=2.0**-7, atol=1e-6)
        differ, count = differ + np.sum(a != b), count + a.size
    assert 0.01 < differ / count < 0.6


@pytest.mark.parametrize("zero", [2, 3])
def test_the_compiler_gives_a_device_its_part_of_the_memory(zero: int):
    """A model of many layers. ZeRO-2: no device holds a whole gradient. ZeRO-3: each of 8 devices holds 1/8 between
    steps, and some whole layers in a step.
    """
    keys = ["optim.name=adamw", "model.num_layers=16", "model.d_model=64", "batch_size=8", "optim.ema_decay=0.9"]
    found = {z: compile_step(make_config(*keys, f"parallel.zero={z}"), jax.devices()[:8], VOCAB) for z in (0, zero)}
    params = sum(4 * x.size for x in jax.tree.leaves(found[0].params))
    layer = sum(4 * x.size // 16 for x in jax.tree.leaves(found[0].params["layers"]))
    state = {0: 4 * params, 2: 2 * params + 2 * params / 8, 3: 4 * params / 8}
    for z, compiled in found.items():
        assert compiled.arguments == pytest.approx(state[z], rel=0.01)
        assert compiled.in_place == pytest.approx(compiled.arguments, rel=0.01)
    most = {2: found[0].temporary - params, 3: 3 / 8 * params + 4 * layer}
    assert found[zero].temporary < most[zero]


def test_no_device_makes_the_whole_model():
    """Nor does any make it on the way to its parts and back, if the devices divide its sizes."""
    config = make_config("optim.name=adamw", "model.num_layers=3", "model.d_model=64", "parallel.zero=3")
    model, devices = make_model(config.model, 32, 8), jax.devices()[:8]
    placement = Placement(config, model, devices)
    key, whole = jax.random.key(config.seed), placement.whole
    bytes_of = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(whole))
    largest = max(x.size * x.dtype.itemsize for x in jax.tree.leaves(whole))
    found = placement.initial_program().lower(key).compile().memory_analysis()
    assert found.output_size_in_bytes < 1.05 * bytes_of / 8
    assert found.temp_size_in_bytes < largest
    state = placement.initial()
    plain = Placement(make_config("optim.name=adamw", "model.num_layers=3", "model.d_model=64"), model, devices)
    saved, want = placement.saved(state), plain.initial()
    assert saved is not None
    jax.tree.map(np.testing.assert_array_equal, *map(jax.device_get, (saved.params, want.params)))
    held = held_bytes(state, devices)
    assert held["params"] + held["opt_state"] + held["ema"] < 1.05 * bytes_of / 8 + 200
