"""Makes hosts wait for each other before they exchange data over their devices, however long one of them takes.

XLA connects the hosts when a program exchanges over a set of devices for the first time. On CPU, Gloo then waits 30
seconds for the other hosts and fails. A host that reads its data or compiles for longer would end the run. So all
connections are made at once, when every host is ready, and no host runs a program before every host has compiled it.
"""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxlm.host import distributed


def meet(what: str) -> None:
    """Waits until all hosts have called this. Messages name the host that is late, and `what` it is late with."""
    distributed.from_all(what, "")


def connect(devices: list[Any]) -> None:
    """Connects `devices`, which are those of all hosts, with each other. Later programs use the same connections."""
    if jax.process_count() == 1:
        return
    here = [d for d in devices if d.process_index == jax.process_index()]
    ones = jax.device_put(np.ones(len(here), np.float32), NamedSharding(Mesh(here, ("i",)), PartitionSpec("i")))
    total = compiled(jax.pmap(lambda x: jax.lax.psum(x, "i"), axis_name="i", devices=devices), "devices")
    jax.block_until_ready(total(ones))
    multihost_utils.sync_global_devices("jaxlm")  # Orbax exchanges over other sets of devices, in this way


def compiled(program: Callable, what: str) -> Callable:
    """Wraps a jitted program so that no host runs it before all hosts have compiled it.

    Args:
      what: names the program in messages about a late host.
    """
    if jax.process_count() == 1:
        return program
    met = False

    def run(*args: Any) -> Any:
        nonlocal met
        if not met:
            program.lower(*args).compile()  # JAX caches the compiled program for the call below
            meet(f"the compiled program ({what})")
            met = True
        return program(*args)

    return run
