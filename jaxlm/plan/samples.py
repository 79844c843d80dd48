"""What a layer and a sequence cost, read from steps of a few layers and sequences compiled for one device.

Seconds and bytes of a step of L layers and r sequences are a + b L + c r + d L r. Four programs give the numbers:
a and b are those of the optimizer, c those of embeddings, output layer and losses, and d those of a layer.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

from jaxlm.config import Config
from jaxlm.plan.devices import Device
from jaxlm.plan.planning import ROOMY, Plan, make_plan

LAYERS = 4  # of the smaller programs; loops of two layers are compiled in another way
CONTEXT = 2  # devices that share the sequences of a sample for `parallel.context`


class Affine(NamedTuple):
    """a + b L + c r + d L r of L layers and r sequences, none of them negative."""

    fixed: float
    layer: float
    row: float
    layer_row: float


class Sample(NamedTuple):
    """Of one device that has whole layers and whole sequences."""

    seconds: Affine  # of computation in a step with one micro-batch
    kept: Affine  # bytes for the backward pass
    working: Affine  # bytes of all else that a step holds


def sample(config: Config, device: Device, vocab_size: int, remat: str, context: bool) -> Sample:
    """Args: context: whether devices share sequences, whose attention is another program."""
    every = config.model.global_every or 1  # every n-th layer may differ
    some = every * -(-LAYERS // every)
    roomy = device._replace(memory=ROOMY)
    plans = {
        (n, rows): make_plan(
            _small(config, n * some, rows, remat, context), roomy, CONTEXT if context else 1, vocab_size
        )
        for n in (1, 2)
        for rows in (1, 2)
    }

    def affine(number: Callable[[Plan], float]) -> Affine:
        # Two devices that share sequences have half of each.
        x = {at: number(plan) for at, plan in plans.items()}
        layer_row = (x[2, 2] - x[2, 1] - x[1, 2] + x[1, 1]) / some
        row = x[1, 2] - x[1, 1] - layer_row * some
        layer = (x[2, 1] - x[1, 1]) / some - layer_row
        fixed = x[1, 1] - row - layer * some - layer_row * some
        devices = CONTEXT if context else 1
        return Affine(*(max(0.0, y) for y in (fixed, layer, row * devices, layer_row * devices)))

    return Sample(
        seconds=affine(lambda plan: plan.time.computation),
        kept=affine(lambda plan: plan.memory.kept),
        working=_working(plans),
    )


def _working(plans: dict[tuple[int, int], Plan]) -> Affine:
    """The most that programs hold with one sequence and with two. It does not grow with layers."""
    one, two = (max(plan.memory.working for (_, rows), plan in plans.items() if rows == n) for n in (1, 2))
    row = max(0.0, two - one)
    return Affine(max(0.0, one - row), 0.0, row, 0.0)


def _small(config: Config, layers: int, rows: int, remat: str, context: bool) -> Config:
    parallel = dataclasses.replace(
        config.parallel, tensor=1, pipeline=1, chunks=1, context=CONTEXT if context else 1, zero=0, reduce="pmean",
        overlap=False,
    )  # fmt: skip
    return dataclasses.replace(
        config,
        batch_size=rows,
        model=dataclasses.replace(config.model, num_layers=layers, remat=remat, scan_unroll=1),
        optim=dataclasses.replace(config.optim, accum_steps=1),
        parallel=parallel,
    )
