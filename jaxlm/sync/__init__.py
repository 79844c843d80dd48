"""How gradients move between devices.

`base.py` has the interfaces, `group.py` the collectives; then one file for each reduction. `gradients.py` applies one
to gradients, `overlap.py` does so inside the backward pass, `zero.py` shards the optimizer. Other rooms take the names
below from here.

May import: config.
"""

from typing import Any

import jax

from jaxlm.config import ParallelConfig
from jaxlm.sync.base import GradSync, Reduction
from jaxlm.sync.bf16 import bf16
from jaxlm.sync.fp16 import fp16
from jaxlm.sync.gradients import make_grad_sync
from jaxlm.sync.group import Group
from jaxlm.sync.int8 import int8
from jaxlm.sync.pmean import pmean
from jaxlm.sync.powersgd import powersgd
from jaxlm.sync.ring import ring
from jaxlm.sync.topk import topk

__all__ = ["GradSync", "Group", "Reduction", "make_reduction", "make_sync"]


def make_reduction(config: ParallelConfig, group: Group) -> Reduction:
    """The strategy that `parallel.reduce` names."""
    # Gloo comes near the speed of the wire in all-reduces alone; from 5 devices on too few levels are left for a sum.
    integer_sum = jax.default_backend() == "cpu" and group.size <= 4
    return {
        "pmean": lambda: pmean(group),
        "ring": lambda: ring(group),
        "bf16": lambda: bf16(group),
        "fp16": lambda: fp16(group),
        "int8": lambda: int8(group, integer_sum),
        "topk": lambda: topk(group, config.topk_density),
        "powersgd": lambda: powersgd(group, config.powersgd_rank),
    }[config.reduce]()


def make_sync(config: ParallelConfig, group: Group, params: Any) -> GradSync:
    """`params`: the shapes of all parameters."""
    return make_grad_sync(make_reduction(config, group), group, params, config)
