"""Every grid of eight devices, data x pipeline x context x tensor, trains as one device does."""

import itertools
import math

import numpy as np
import pytest

from tests.grids import assert_same, check_comes_back, train

pytestmark = pytest.mark.usefixtures("fast_compile")

STEPS = 20
GRIDS = [g for g in itertools.product((1, 2, 4, 8), repeat=4) if math.prod(g) == 8]
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


@pytest.mark.parametrize("number, grid", list(enumerate(GRIDS)), ids=["x".join(map(str, g)) for g in GRIDS])
def test_a_grid_is_the_same_training(number: int, grid: tuple[int, int, int, int]):
    kind = [*BASE, *KINDS[number % len(KINDS)], *(["model.num_layers=8"] if 8 in grid[1:2] else [])]
    want = train(1, *kind, steps_done=STEPS)
    got = train(8, *kind, *overrides_of(number, grid), steps_done=STEPS)
    assert_same(got, want)
    assert np.ptp(want.metrics[:, 0]) > 0.01  # it learns, so equal losses mean something
    check_comes_back(got)
