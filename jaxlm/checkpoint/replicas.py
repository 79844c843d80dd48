"""Checks that all devices that should hold the same state do, bit for bit. Failing memory or a failing chip changes one
copy silently.

Every device has a copy of the parameters, and of all other state that is not split over the devices; where they hold
parts of the model, those of different replicas have the same part. Before a checkpoint, each device computes a checksum
of each array of its copy, and the hosts compare them. A single changed word always changes the checksum, because each
word is multiplied by an odd number that depends on its place. Only hosts with the same hardware are compared, because
processors of different kinds round differently.
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
from jaxlm.train.one_device import AXIS
from jaxlm.train.step import TrainState, state_axes


class Corrupt(RuntimeError):
    """Devices that should hold the same state do not: exit code 5, because the last checkpoint is good."""


class Replicas:
    """Compares the state on all devices. `mesh` holds the devices of this process."""

    def __init__(self, config: Config, mesh: Mesh):
        self._config, self._mesh = config, mesh
        self._sums = [checksums_of(mesh, PartitionSpec()), checksums_of(mesh, PartitionSpec(AXIS))]

    def check(self, step: int, state: TrainState) -> None:
        """Raises Corrupt, on all hosts alike, if what should be the same differs between devices."""
        parts = self._same_on_all(state), self._same_in_replicas(state)
        names = list(shapes(parts[0])), list(shapes(parts[1]))
        sums = [
            np.asarray(program(tree)).tolist() if tree else [] for program, tree in zip(self._sums, parts, strict=True)
        ]
        devices = self._mesh.devices.flat
        names_D = [f"{d.id if d.local_hardware_id is None else d.local_hardware_id} ({d.device_kind})" for d in devices]
        content = json.dumps([_hardware(devices[0].device_kind), names_D, sums])
        found = distributed.from_all(f"the sums of step {step}", content)
        for which, groups in enumerate(self._groups([json.loads(text) for text in found])):
            for group in groups:
                if wrong := difference(names[which], group):
                    raise Corrupt(
                        f"step {step}: {wrong}; this state is not saved, and the same command resumes from the newest"
                        " checkpoint, which is good; if this happens again, take that device out of use"
                    )

    def _same_on_all(self, state: TrainState) -> dict[str, Any]:
        axes = state_axes(self._config)
        return {k: x for k, x in state._asdict().items() if getattr(axes, k) is None and x is not None}

    def _same_in_replicas(self, state: TrainState) -> dict[str, Any]:
        """What devices with the same place in different replicas hold alike: parts of the model, not those of ZeRO."""
        p = self._config.parallel
        fields = (*(("params", "ema") if p.zero < 3 else ()), *(("opt_state",) if not p.zero else ()))
        return {k: x for k in fields if p.splits_model and (x := getattr(state, k)) is not None}

    def _groups(self, found: list[Any]) -> tuple[list[dict[str, list[int]]], list[dict[str, list[int]]]]:
        """Devices to compare, with their checksums: for what all hold alike, and for what replicas do."""
        p = self._config.parallel
        all_, replicas = {}, {}
        for host, (hardware, names_D, (sums, of_parts)) in enumerate(found):
            for i, device in enumerate(names_D):
                name, index = f"device {device} of {distributed.name(host)}", host * len(names_D) + i
                all_.setdefault(hardware, {})[name] = sums[i]
                if of_parts:
                    stage = index % p.of_a_replica // (p.context * p.tensor)
                    replicas.setdefault((hardware, stage, index % p.tensor), {})[name] = of_parts[i]
        return list(all_.values()), list(replicas.values())


def checksums_of(mesh: Mesh, spec: PartitionSpec) -> Callable[[Any], jax.Array]:
    """Compiles (tree of L arrays of this sharding on the mesh) -> checksums of what each device has, uint32 [D, L]."""

    def one(tree: Any) -> jax.Array:
        return jnp.stack([checksum(x) for x in jax.tree.leaves(tree)])[None]

    return jax.jit(jax.shard_map(one, mesh=mesh, in_specs=spec, out_specs=PartitionSpec(AXIS), check_vma=False))


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
