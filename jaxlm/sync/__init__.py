"""How gradients move between devices.

`base.py` has the interfaces, `group.py` the collectives, `grid.py` the groups; then one file for each reduction.
`gradients.py` applies one to gradients, `overlap.py` does so inside the backward pass, `zero.py` shards state over the
devices, `cuts.py` knows which of them hold which part of the model. Other rooms take the names below from here.

May import: config.
"""

from collections.abc import Callable
from typing import Any

from jaxlm.config import ParallelConfig
from jaxlm.sync.base import GradSync, Reduction
from jaxlm.sync.bf16 import bf16
from jaxlm.sync.cuts import Cuts
from jaxlm.sync.fp16 import fp16
from jaxlm.sync.gradients import make_grad_sync
from jaxlm.sync.grid import Grid, make_grid
from jaxlm.sync.group import Group
from jaxlm.sync.int8 import int8
from jaxlm.sync.pmean import pmean
from jaxlm.sync.powersgd import powersgd
from jaxlm.sync.ring import ring
from jaxlm.sync.topk import topk

__all__ = ["REDUCTIONS", "GradSync", "Grid", "Group", "Reduction", "make_grid", "make_reduction", "make_sync"]


# {parallel.reduce: how a group's devices average gradients}
REDUCTIONS: dict[str, Callable[[Group, ParallelConfig], Reduction]] = {
    "pmean": lambda group, c: pmean(group),
    "ring": lambda group, c: ring(group),
    "bf16": lambda group, c: bf16(group),
    "fp16": lambda group, c: fp16(group),
    "int8": lambda group, c: int8(group, _sums_integers(group)),
    "topk": lambda group, c: topk(group, c.topk_density),
    "powersgd": lambda group, c: powersgd(group, c.powersgd_rank),
}


def _sums_integers(group: Group) -> bool:
    """Whether int8 adds up integers: only Gloo's all-reduces come near the speed of the wire, and with more than 4
    devices too few levels are left for a sum.
    """
    return group.on_cpu and group.size <= 4


def make_reduction(config: ParallelConfig, group: Group) -> Reduction:
    """The reduction that `parallel.reduce` names."""
    return REDUCTIONS[config.reduce](group, config)


def make_sync(config: ParallelConfig, group: Group, params: Any, cuts: Cuts | None = None) -> GradSync:
    """The synchronization of gradients that a configuration names.

    Args:
      group: devices that hold the same parameters.
      params: shapes of what a device holds of all parameters, without ZeRO.
      cuts: how further devices divide the parameters; None = not at all.
    """
    return make_grad_sync(make_reduction(config, group), group, params, config, cuts)
