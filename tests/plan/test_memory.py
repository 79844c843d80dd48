"""Compares planned memory with the arrays of a real state, and with what the compiler says of a step."""

import dataclasses
from typing import Any

import jax
import pytest

from jaxlm.config import Config, UserError
from jaxlm.config.files import BASE, load
from jaxlm.model import make_model
from jaxlm.plan.compiled import compile_step
from jaxlm.plan.memory import kept_bytes, least_bytes, plan_memory, refuse_over
from jaxlm.train.one_device import one_device
from jaxlm.train.placement import Placement
from tests.grids import PAIRS

VOCAB = 300
ENCODER = [
    "model.encoder_layers=2",
    "model.encoder_len=48",
    *PAIRS,
]


def some_config(*parallel: str, **model: Any) -> Config:
    overrides = ["batch_size=32", "seq_len=64", "optim.name=adamw", "optim.ema_decay=0.9", "optim.accum_steps=2"]
    layers = ["model.num_layers=4", "model.d_model=48", "model.num_heads=2"]
    config = load(BASE, [f"--config.{o}" for o in [*overrides, *layers, "parallel.zero=1", *parallel]])
    small = {"num_layers": 3} | model if not parallel else model
    return dataclasses.replace(config, model=dataclasses.replace(config.model, **small))


@pytest.mark.parametrize(
    "remat, parallel",
    [
        ("none", []),
        ("elementwise", []),
        ("full", []),
        ("full", ["parallel.tensor=2"]),
        ("elementwise", ["parallel.context=2", "parallel.zero=3"]),
        ("full", ["parallel.pipeline=2", "optim.accum_steps=4"]),
        pytest.param("elementwise", [*ENCODER, "parallel.zero=3"], marks=pytest.mark.ci),
        pytest.param("full", [*ENCODER, "parallel.tensor=2"], marks=pytest.mark.ci),
    ],
)
def test_the_plan_equals_the_state_and_what_the_compiler_says(remat: str, parallel: list[str]):
    config, devices = some_config(*parallel, remat=remat), jax.devices()[:4]
    model = make_model(config.model, VOCAB, config.seq_len)
    compiled = compile_step(config, devices, VOCAB)
    memory = plan_memory(config, model, compiled, 4)
    state = Placement(config, model, devices).initial()
    real = sum(s.data.nbytes for x in jax.tree.leaves(state) for s in x.addressable_shards if s.device == devices[0])
    assert memory.state == pytest.approx(real + memory.batch, abs=200)  # scalars of the guard
    assert memory.total == pytest.approx(compiled.arguments + max(compiled.temporary, memory.kept + memory.gradients))
    least = least_bytes(config, model, 4)
    assert 0.2 * memory.total < least <= memory.total


def test_recomputing_more_keeps_less():
    kept = []
    for remat in ("none", "elementwise", "full"):
        config = some_config(remat=remat)
        kept.append(kept_bytes(config, one_device(config, make_model(config.model, VOCAB, config.seq_len), 1), 4))
    # A layer of this model keeps at least its input, of 48 float32 numbers for each of 4 x 64 tokens.
    assert kept[0] > 1.5 * kept[1] > 3 * kept[2] >= 3 * 3 * 4 * 64 * 48 * 4


def test_a_step_that_cannot_fit_is_refused_with_its_numbers():
    config = some_config()
    model = make_model(config.model, VOCAB, config.seq_len)
    least = least_bytes(config, model, 4)
    refuse_over(None, config, model, 4)  # a CPU, which reports no limit
    refuse_over(least, config, model, 4)
    with pytest.raises(UserError, match=r"batch_size is 32: a step needs at least [\d.]+ GB on each of 4 devices; all"):
        refuse_over(least - 1, config, model, 4)


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_parts_of_more_devices_are_planned_from_a_program_for_few(micro_batches: int):
    """ZeRO-3 converts its parts to bfloat16, and with two micro-batches has two gradients of its parts."""
    keys = ["parallel.zero=3", "model.dtype=bfloat16", f"optim.accum_steps={micro_batches}"]
    config = some_config(*keys)
    model = make_model(config.model, VOCAB, config.seq_len)
    few = dataclasses.replace(config, batch_size=config.batch_size // 4)
    planned = plan_memory(config, model, compile_step(few, jax.devices()[:2], VOCAB), 8)
    compiled = plan_memory(config, model, compile_step(config, jax.devices()[:8], VOCAB), 8)
    assert planned.working == pytest.approx(compiled.working, rel=0.15)  # on CPU there is one more copy of the parts
