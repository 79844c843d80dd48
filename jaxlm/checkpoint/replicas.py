"""Checks that all devices hold the same state, bit for bit. Failing memory or a failing chip changes one copy silently.

Every device has a copy of the parameters, and of all other state that is not split over the devices. Before a
checkpoint, each device computes a checksum of each array of its copy, and the hosts compare them. A single changed word
always changes the checksum, because each word is multiplied by an odd number that depends on its place. Only hosts with
the same hardware are compared, because processors of different kinds round differently.
"""

import hashlib
import json
import os
import platform
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from jaxlm.checkpoint.reading import shapes
from jaxlm.config import Config
from jaxlm.host import distributed
from jaxlm.train.step import AXIS, TrainState, state_axes


class Corrupt(RuntimeError):
    """Devices that should hold the same state do not: exit code 5, because the last checkpoint is good."""


class Replicas:
    """Compares the state on all devices. `mesh` holds the devices of this process."""

    def __init__(self, config: Config, mesh: Mesh):
        self._axes, self._mesh = state_axes(config), mesh
        self._sums: Callable | None = None

    def check(self, step: int, state: TrainState) -> None:
        """Raises Corrupt, on all hosts alike, if the replicated part of the state differs between devices."""
        parts = {k: x for k, x in state._asdict().items() if getattr(self._axes, k) is None}
        names = list(shapes(parts))
        if self._sums is None:
            self._sums = checksums_of(self._mesh)
        sums_DL = np.asarray(self._sums(parts)).tolist()
        devices = self._mesh.devices.flat
        names_D = [f"{d.id if d.local_hardware_id is None else d.local_hardware_id} ({d.device_kind})" for d in devices]
        content = json.dumps([_hardware(devices[0].device_kind), names_D, sums_DL])
        found = distributed.from_all(f"the sums of step {step}", content)
        by_hardware: dict[str, dict[str, list[int]]] = {}
        for host, (hardware, names_D, sums_DL) in enumerate(map(json.loads, found)):
            named = {f"device {d} of {distributed.name(host)}": s for d, s in zip(names_D, sums_DL, strict=True)}
            by_hardware.setdefault(hardware, {}).update(named)
        for sums in by_hardware.values():
            if wrong := difference(names, sums):
                raise Corrupt(
                    f"step {step}: {wrong}; this state is not saved, and the same command resumes from the newest"
                    " checkpoint, which is good; if this happens again, take that device out of use"
                )


def checksums_of(mesh: Mesh) -> Callable[[Any], jax.Array]:
    """Compiles (tree of L arrays, a copy on each device of the mesh) -> their checksums, uint32 [D, L]."""

    def one(tree: Any) -> jax.Array:
        return jnp.stack([checksum(x) for x in jax.tree.leaves(tree)])[None]

    return jax.jit(
        jax.shard_map(one, mesh=mesh, in_specs=PartitionSpec(), out_specs=PartitionSpec(AXIS), check_vma=False)
    )


def checksum(x: jax.Array) -> jax.Array:
    """Returns the sum of an array's words, each times an odd number that depends on its place, modulo 2^32; uint32."""
    words = jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * x.dtype.itemsize}")).reshape(-1)
    place = jax.lax.iota(jnp.uint32, words.size)
    return jnp.sum(words.astype(jnp.uint32) * (place * jnp.uint32(2654435761) | 1), dtype=jnp.uint32)


def difference(names: list[str], sums: dict[str, list[int]]) -> str | None:
    """Says in words which arrays differ between devices; None if none does.

    If more than half of the devices agree, the others are at fault; otherwise all are named.

    Args:
      names: of the arrays.
      sums: {device: checksum of each array}.
    """
    (usual, count), *_ = Counter(map(tuple, sums.values())).most_common(1)
    others = [device for device, s in sums.items() if tuple(s) != usual]
    if not others:
        return None
    if 2 * count <= len(sums):
        first = next(iter(sums.values()))
        arrays = [n for i, n in enumerate(names) if any(s[i] != first[i] for s in sums.values())]
        return f"{' and '.join(sums)} differ in {_few(arrays)}"
    arrays = [n for i, n in enumerate(names) if any(sums[d][i] != usual[i] for d in others)]
    return f"{' and '.join(others)} differ{'s' * (len(others) == 1)} from the {count} others in {_few(arrays)}"


def _few(arrays: list[str]) -> str:
    return arrays[0] + (f" and {len(arrays) - 1} more arrays" if len(arrays) > 1 else "")


def _hardware(device_kind: str) -> str:
    """Returns a hash of what determines how a host rounds: its accelerators; on CPU its processor, and the numbers of
    cores and devices, which decide how XLA splits a product among threads.
    """
    facts = [device_kind, platform.machine()]
    cpuinfo = Path("/proc/cpuinfo")
    if jax.default_backend() == "cpu" and cpuinfo.exists():
        known = (line for line in cpuinfo.read_text().splitlines() if line.startswith(("model", "flags", "Features")))
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        facts += [str(cores), str(jax.local_device_count()), *sorted(set(known))]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:12]
