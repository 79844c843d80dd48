"""Devices that a run can be planned for: rates, memory, links and power, and what XLA must know to compile for them.

Rates are those of the makers' data sheets, dense, with sums in float32. What programs reach of them is less: `REACHED`.
"""

import os
import re
from collections.abc import Callable
from typing import NamedTuple

from jaxlm.config import UserError, show

# Large bfloat16 products ran at 770 to 800 of an H100's 989 TFLOP/s. The memory's rate is the nominal one, of which a
# copy reached nine tenths.
REACHED = 800 / 989


class Chip(NamedTuple):
    """What XLA's compiler reads of a GPU's description (openxla/xla, xla/backends/gpu/target_config/specs)."""

    capability: tuple[int, int]
    cores: int  # streaming multiprocessors
    lanes: int  # float32 units of one
    clock_ghz: float
    cache: int  # L2, bytes
    shared: int  # shared memory of a core, bytes
    threads: int  # most threads on a core


class Device(NamedTuple):
    name: str  # as JAX shows it, or a part of that
    flops: float  # bfloat16 products, FLOP/s
    flops_float32: float  # float32 products, FLOP/s; without TF32, which JAX uses on GPUs only when asked
    bandwidth: float  # of its memory, bytes/s
    memory: float  # bytes
    link: float  # to the other devices of its host, bytes/s in one direction
    per_host: int  # devices of a host in the usual machine
    watts: float  # limit of its power; 0 = unknown
    source: str
    chip: Chip | None  # None = not a GPU


NETWORK = 50e9  # bytes/s in one direction between hosts, for each device: 400 Gbit/s, as in DGX H100
# Seconds for one step, by which NCCL chooses among its algorithms (src/graph/tuning.cc, a ring with protocol Simple).
LATENCY = {"link": 3.4e-6, "network": 14e-6}

_AMPERE = Chip((8, 0), 108, 64, 1.41, 40 * 2**20, 164 * 2**10, 2048)
_HOPPER = Chip((9, 0), 132, 128, 1.98, 50 * 2**20, 228 * 2**10, 2048)
_BLACKWELL = Chip((10, 0), 148, 128, 1.965, 126 * 2**20, 228 * 2**10, 2048)

GB = 1e9
DEVICES = {
    "A100-40": Device("A100-SXM4-40GB", 312e12, 19.5e12, 1555 * GB, 40 * GB, 300 * GB, 8, 400,
                      "NVIDIA A100 datasheet, 2021", _AMPERE),
    "A100-80": Device("A100-SXM4-80GB", 312e12, 19.5e12, 2039 * GB, 80 * GB, 300 * GB, 8, 400,
                      "NVIDIA A100 datasheet, 2021", _AMPERE),
    "H100": Device("H100 80GB HBM3", 989e12, 67e12, 3350 * GB, 80 * GB, 450 * GB, 8, 700,
                   "NVIDIA H100 datasheet, SXM, 2024", _HOPPER),
    "H200": Device("H200", 989e12, 67e12, 4800 * GB, 141 * GB, 450 * GB, 8, 700,
                   "NVIDIA H200 datasheet, SXM, 2024", _HOPPER),
    "B200": Device("B200", 2250e12, 80e12, 8000 * GB, 180 * GB, 900 * GB, 8, 1000,
                   "NVIDIA HGX B200 datasheet, 2024", _BLACKWELL),
    "RTX4090": Device("GeForce RTX 4090", 165e12, 82.6e12, 1008 * GB, 24 * GB, 32 * GB, 2, 450,
                      "NVIDIA Ada GPU architecture whitepaper, 2022; PCIe 4.0 x16",
                      Chip((8, 9), 128, 128, 2.52, 72 * 2**20, 100 * 2**10, 1536)),
    "L4": Device("L4", 121e12, 30.3e12, 300 * GB, 24 * GB, 32 * GB, 8, 72,
                 "NVIDIA L4 datasheet, 2023; PCIe 4.0 x16",
                 Chip((8, 9), 58, 128, 2.04, 48 * 2**20, 100 * 2**10, 1536)),
    "A10G": Device("A10G", 70e12, 35e12, 600 * GB, 24 * GB, 32 * GB, 8, 300,
                   "NVIDIA A10G datasheet, 2021; PCIe 4.0 x16",
                   Chip((8, 6), 80, 128, 1.71, 6 * 2**20, 100 * 2**10, 1536)),
}  # fmt: skip
CPU = "CPU"


def this_cpu(count: int) -> Device:
    """One of `count` devices that share this machine, with the rates that it reaches now."""
    import time

    import numpy as np

    def seconds(act: Callable[[], object]) -> float:
        """The shortest of several times."""
        times = []
        for _ in range(8):
            began = time.perf_counter()
            act()
            times.append(time.perf_counter() - began)
        return min(times)

    matrix, array = np.ones((2048, 2048), np.float32), np.ones(2**26, np.uint8)
    copy = array.copy()
    flops = 2 * len(matrix) ** 3 / seconds(lambda: matrix @ matrix) / count
    bandwidth = 2 * array.size / seconds(lambda: np.copyto(copy, array)) / count
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / count
    return Device(
        name=CPU,
        flops=flops / REACHED,
        flops_float32=flops / REACHED,
        bandwidth=bandwidth,
        memory=memory,
        link=bandwidth / 2,  # an exchange is a copy
        per_host=count,
        watts=0.0,
        source="measured here with NumPy",
        chip=None,
    )


def find(name: str, count: int = 1) -> Device:
    """The device of a name, in any case, with or without hyphens and spaces. CPU is this machine, which `count` share.

    Raises:
      UserError: there is none.
    """

    def plain(text: str) -> str:
        return "".join(c for c in text.lower() if c.isalnum())

    if plain(name) == plain(CPU):
        return this_cpu(count)
    for known, device in DEVICES.items():
        if plain(known) == plain(name):
            return device
    raise UserError(f"--device is {show(name)}; allowed: {', '.join([*DEVICES, CPU])}")


def name_of(kind: str) -> str | None:
    """The name of a device that JAX calls `kind`; None = not in the table."""
    if kind == "cpu":
        return CPU
    return next((name for name, d in DEVICES.items() if re.search(rf"\b{re.escape(d.name)}\b", kind)), None)


def target_config(device: Device) -> str:
    """The device's description for XLA, in its text format."""
    assert device.chip is not None
    c = device.chip
    return f"""
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
  shared_memory_per_core: {c.shared} shared_memory_per_block_optin: {c.shared - 1024}
  threads_per_core_limit: {c.threads} core_count: {c.cores} fpus_per_core: {c.lanes}
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: {device.bandwidth:.0f} l2_cache_size: {c.cache} clock_rate_ghz: {c.clock_ghz}
  device_memory_size: {device.memory:.0f}
  cuda_compute_capability {{ major: {c.capability[0]} minor: {c.capability[1]} }}
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 }}
runtime_version {{ major: 12 minor: 9 patch: 0 }}
device_description_str: "NVIDIA {device.name}"
"""
