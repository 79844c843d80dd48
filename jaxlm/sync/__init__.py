"""How gradients move between devices: `base.py` is the interface, each other file one strategy."""

from jaxlm.config import ParallelConfig
from jaxlm.sync.base import GradSync
from jaxlm.sync.pmean import pmean


def make_sync(config: ParallelConfig, axis: str) -> GradSync:
    """The strategy that `parallel.reduce` names, over the device axis `axis`."""
    return {"pmean": pmean}[config.reduce](axis)
