"""Every grid of eight devices, data x pipeline x context x tensor, trains as one device does."""

import itertools
import math
from typing import Any

import jax
import numpy as np
import pytest

from jaxlm.plan.compiled import compile_step
from tests.grids import RTOL, assert_same, check_comes_back, make_config, train

GRIDS: list[Any] = [g for g in itertools.product((1, 2, 4, 8), repeat=4) if math.prod(g) == 8]
BASE = [
    "steps=100",
    "batch_size=16",
    "seq_len=16",
    "model.num_layers=4",
    "model.d_model=32",
    "model.num_heads=8",
    "model.num_kv_heads=2",
    "model.d_ff=48",
]
# Models and optimizers that differ in all that a grid divides.
KINDS = [
    ["optim.name=adamw", "model.tie_embeddings=true", "model.scale_embeddings=true", "optim.lr=0.003"],
    ["optim.name=muon", "model.norm=layernorm", "model.use_bias=true", "model.position=learned", "model.qk_norm=true"],
    [
        "optim.name=adafactor",
        "model.post_norms=true",
        "loss.label_smoothing=0.1",
        "loss.z_loss=0.01",
        "loss.chunk=24",
    ],
    ["optim.name=sgd", "model.dropout=0.2", "model.key_offset=true", "data.packing=document"],
    [
        "optim.name=adamw",
        "model.window=5",
        "model.global_every=2",
        "model.attention_softcap=3",
        "model.qkv_bias=true",
        "model.activation=swiglu",
    ],
]


def overrides_of(number: int, grid: tuple[int, int, int, int]) -> list[str]:
    """A grid's own overrides, which differ from grid to grid."""
    _, pipeline, context, tensor = grid
    found = [f"parallel.pipeline={pipeline}", f"parallel.context={context}", f"parallel.tensor={tensor}"]
    found += [f"model.remat={['elementwise', 'full'][number % 2]}"]
    if pipeline == 1:
        return [*found, f"optim.accum_steps={1 + number % 2}", f"parallel.zero={number % 4}", "parallel.reduce=ring"]
    schedule, chunks = ("gpipe", "1f1b")[number % 2], 2 if pipeline == 2 and number % 3 == 0 else 1
    found += ["optim.accum_steps=2", f"parallel.schedule={schedule}", f"parallel.chunks={chunks}"]
    return [*found, f"parallel.zero={number % 2}"]


IDS = ["x".join(map(str, grid)) for grid in GRIDS]
FEW = [(1, 2, 2, 2), (2, 1, 2, 2)]  # that every run of the tests tries


@pytest.mark.grids
@pytest.mark.parametrize("number, grid", list(enumerate(GRIDS)), ids=IDS)
def test_each_grid_is_the_same_training(number: int, grid: tuple[int, int, int, int]):
    compare(number, grid, 20)


@pytest.mark.parametrize("grid", FEW, ids=lambda grid: "x".join(map(str, grid)))
def test_a_grid_is_the_same_training(grid: tuple[int, int, int, int]):
    compare(GRIDS.index(grid), grid, 4)


def compare(number: int, grid: tuple[int, int, int, int], steps: int) -> None:
    # In every second pipeline the last stage has a layer less than the others.
    layers = {1: 4, 2: 4, 4: 4, 8: 8}[grid[1]] + (3 if number % 2 and grid[1] in (2, 4) else 0)
    kind = [*BASE, *KINDS[number % len(KINDS)], f"model.num_layers={layers}"]
    want = train(1, *kind, steps_done=steps)
    got = train(8, *kind, *overrides_of(number, grid), steps_done=steps)
    assert_same(got, want)
    assert np.ptp(want.metrics[:, 0]) > 0.01  # it learns, so equal losses mean something
    check_comes_back(got)


def test_an_optimizer_may_have_placeholders_beside_layers():
    """Adafactor's for the moments that a parameter has not; with chunks, none is reordered as layers are."""
    keys = [*BASE, *KINDS[2]]
    want = train(1, *keys, steps_done=2)
    more = ["parallel.pipeline=2", "parallel.chunks=2", "parallel.zero=1", "optim.accum_steps=2"]
    got = train(4, *keys, *more, steps_done=2)
    assert_same(got, want)
    check_comes_back(got)


def test_statistics_of_layers_are_those_of_one_device():
    keys = [*BASE, *KINDS[1], "log.layer_stats=true", "log.every_steps=1"]
    want = train(1, *keys, steps_done=2)
    got = train(8, *keys, "parallel.tensor=2", "parallel.context=2", "parallel.zero=1", steps_done=2)
    assert len(want.stats) > 6 and want.stats["layers/grad_norm"].shape == (4,)
    assert got.stats.keys() == want.stats.keys()
    for name, numbers in want.stats.items():
        assert np.all(numbers > 0), name
        np.testing.assert_allclose(got.stats[name], numbers, rtol=RTOL, err_msg=name)


@pytest.mark.parametrize("parallel", [["tensor=4"], ["context=2", "tensor=2"], ["pipeline=2", "tensor=2"]])
def test_a_grid_in_bfloat16_differs_by_rounding(parallel: list[str]):
    """Sums over a tensor group are in bfloat16, as those of other products are not."""
    keys = [*BASE, "optim.name=adamw", "model.dtype=bfloat16", "optim.accum_steps=2", "model.remat=full"]
    want = train(1, *keys, steps_done=3)
    got = train(4, *keys, *(f"parallel.{key}" for key in parallel), steps_done=3)
    np.testing.assert_allclose(got.metrics, want.metrics, rtol=2.0**-8)


def test_no_device_of_a_tensor_group_has_whole_logits():
    """The compiled step has arrays of all tokens by a quarter of the vocabulary, but none by all of it."""
    keys = [*BASE, "optim.name=adamw", "batch_size=48"]
    tokens, vocab = 48 * 16, 512
    texts = {
        size: compile_step(make_config(*keys, f"parallel.tensor={size}"), jax.devices()[:size], vocab).text
        for size in (1, 4)
    }
    assert f"[{tokens},{vocab}]" in texts[1] and f"[{tokens},{vocab // 4}]" in texts[4]
    assert f"[{tokens},{vocab}]" not in texts[4]
