"""Prepares JAX for a run (XLA's flags, CPU devices), chooses the devices, and ends the program.

Nothing here imports jax at module level, because jax reads its flags when it is imported.
"""

import atexit
import os
import re
import sys
import threading
import time
from pathlib import Path
from typing import Any, NoReturn

from jaxlm.config import Config, UserError, show
from jaxlm.host import distributed, signals
from jaxlm.host.startup import on_cpu
from jaxlm.host.stop import LEFT

# oneDNN in XLA aborts the process if a compiled program is dropped within some milliseconds after its last matrix
# product. A run that uses oneDNN therefore keeps its programs (`kept`) and waits before the process ends (`leave`).
SETTLE = 0.2  # seconds to wait
_kept: list[Any] | None = None  # programs to keep; None if the run does not use oneDNN
GPU_MEMORY = 0.92  # share of a GPU's memory that JAX takes; CUDA and NCCL need the rest. JAX's default is 0.75
IMPORTER = "tensorflow-import"  # name of the thread that imports TensorFlow during the first steps


def configure_jax(config: Config, processes: int) -> None:
    """Configures JAX for a run. Call it before any device is touched.

    On CPU there are `parallel.devices` devices, or, if that is 0, one per core, or fewer so that the batch divides
    evenly; for small models this speeds up training more than anything else. A number of devices that the environment
    sets comes first.
    """
    global _kept
    check_environment()
    chosen = cpu_flags(config) if on_cpu() else gpu_flags(config, processes)
    _kept = [] if rounds_products(config) else None
    os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *chosen]).strip()
    import jax

    if config.model.matmul_precision == "highest":
        jax.config.update("jax_default_matmul_precision", "highest")
    if not on_cpu():
        os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", str(GPU_MEMORY))
        return
    flags = os.environ["XLA_FLAGS"]
    if processes > 1:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
    if "xla_force_host_platform_device_count" not in flags and "JAX_NUM_CPU_DEVICES" not in os.environ:
        jax.config.update("jax_num_cpu_devices", config.parallel.devices or _cpu_devices(config, processes))


def has_amx() -> bool:
    """Whether the CPU multiplies bfloat16 matrices in tiles (Intel AMX, in Xeons since Sapphire Rapids)."""
    cpuinfo = Path("/proc/cpuinfo")
    return cpuinfo.exists() and "amx_bf16" in cpuinfo.read_text().split()


def rounds_products(config: Config) -> bool:
    """Whether this run's float32 matrix products on CPU round their operands to bfloat16."""
    return on_cpu() and config.model.matmul_precision == "fastest" and has_amx()


def cpu_flags(config: Config) -> list[str]:
    """XLA's flags for this run on CPU, except those that the environment sets already."""
    flags = {}
    if config.parallel.by_layer:
        # Otherwise XLA combines all exchanges of an unrolled backward pass into one at its end.
        flags["xla_disable_hlo_passes"] = "cpu-all-reduce-combiner"
    if rounds_products(config):
        # XLA's own library computes float32 products in float32; oneDNN uses AMX tiles with operands in bfloat16.
        dots = ("LIBRARY_FUSION_TYPE_DOT", "LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT")
        flags["xla_cpu_use_onednn"] = "true"
        flags["xla_cpu_experimental_onednn_fusion_type"] = ",".join(dots)
        flags["xla_cpu_experimental_ynn_fusion_type"] = "LIBRARY_FUSION_TYPE_REDUCE"  # leaves dots to oneDNN
        os.environ.setdefault("ONEDNN_DEFAULT_FPMATH_MODE", "BF16")
    return _unset(flags)


def kept(program: Any) -> Any:
    """Returns the program, and keeps a reference to it if dropping it could abort the process."""
    if _kept is not None:
        _kept.append(program)
    return program


def leave(code: int) -> NoReturn:
    """Ends the process with this exit code, without the interpreter's shutdown.

    The shutdown ignores signals, takes a second, and may crash threads that are inside XLA or TensorFlow's import.
    """
    if _kept is not None:
        time.sleep(SETTLE)
    left = [thread for thread in threading.enumerate() if thread.name == LEFT]
    if left and distributed.is_one_of_several():
        left.pop().join()  # JAX's exit functions must run, because the other processes wait for them
    if not left:
        atexit._run_exitfuncs()
    signals.settle()
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        pass  # the reader has closed the pipe
    except (OSError, ValueError) as error:
        print(f"jaxlm: some output could not be written: {error}", file=sys.stderr)
        code = code or 2
    os._exit(code)


def _unset(flags: dict[str, str]) -> list[str]:
    """The flags as arguments, without those that XLA_FLAGS names already."""
    own = os.environ.get("XLA_FLAGS", "")
    return [f"--{flag}={value}" for flag, value in flags.items() if flag not in own]


def gpu_flags(config: Config, processes: int) -> list[str]:
    """XLA's flags for this run on GPUs, except those that the environment sets already.

    With more than one device, collectives overlap with computation that does not need their results (latency hiding),
    on a stream of the highest priority. With `parallel.overlap`, ZeRO-2 and ZeRO-3, collectives in the loop over layers
    overlap with the next layer (pipelined). With `parallel.bucket_mb`, XLA combines small collectives up to the size of
    a bucket.
    """
    p, flags = config.parallel, {}
    if config.deterministic:
        flags["xla_gpu_deterministic_ops"] = "true"
    if p.devices != 1 or processes > 1:
        on = ["xla_gpu_enable_latency_hiding_scheduler", "xla_gpu_enable_highest_priority_async_stream"]
        kinds = ["all_reduce", "reduce_scatter", "all_gather"]
        if p.by_layer:
            # XLA would also gather for the next micro-batch before this one ends, and hold the activations of both.
            pipelined = kinds[:2] if p.zero == 3 else kinds
            on += [f"xla_gpu_enable_pipelined_{kind}" for kind in pipelined]
        flags |= dict.fromkeys(on, "true")
        if p.bucket_mb:
            flags |= {f"xla_gpu_{kind}_combine_threshold_bytes": str(int(p.bucket_mb * 2**20)) for kind in kinds}
    return _unset(flags)


def _cpu_devices(config: Config, processes: int) -> int:
    """The largest number of devices, at most one per core, over which a micro-batch divides evenly; or as many as it
    takes for one replica.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    rows, each = config.batch_size // config.optim.accum_steps, config.parallel.of_a_replica
    least = -(-each // processes)
    fits = (
        n for n in range(max(cores, least), least, -1) if not n * processes % each and not rows * each % (n * processes)
    )
    return next(fits, least)


def check_batch(config: Config, devices: int, processes: int) -> None:
    """Raises UserError unless every replica gets the same number of sequences in every micro-batch.

    Args:
      devices: of a host; 0 = not known yet.
    """
    each, p = config.parallel.of_a_replica, config.parallel
    if not devices and each > 1:
        return
    count = (devices or 1) * processes
    if count % each:
        sizes = {name: getattr(p, name) for name in ("pipeline", "context", "tensor") if getattr(p, name) > 1}
        keys, values = (" * ".join(map(str, words)) for words in (map("parallel.{}".format, sizes), sizes.values()))
        raise UserError(f"{keys} is {values}; allowed: a divisor of {count} devices")
    parts = count // each * config.optim.accum_steps
    if config.batch_size % parts:
        devices_of = f" / {each} devices of a replica" if each > 1 else ""
        raise UserError(
            f"batch_size is {config.batch_size}; allowed: a multiple of {parts} = {devices or 1} devices * {processes}"
            f" hosts{devices_of} * {config.optim.accum_steps} optim.accum_steps"
        )


def check_environment() -> None:
    """Raises UserError if an environment variable sets an impossible number of CPU devices. JAX's error would not name
    the variable.
    """
    found = re.search(r"xla_force_host_platform_device_count=(\S*)", os.environ.get("XLA_FLAGS", ""))
    for name, text in (
        ("JAX_NUM_CPU_DEVICES", os.environ.get("JAX_NUM_CPU_DEVICES")),
        ("XLA_FLAGS: xla_force_host_platform_device_count", found and found[1]),
    ):
        if text is not None and not re.fullmatch("[1-9][0-9]{0,3}", text):
            raise UserError(f"{name} is {show(text)}; allowed: 1 to 9999")


def find_devices() -> list:
    """JAX's devices. Raises UserError if there are none, for instance if JAX_PLATFORMS is cuda and there is no GPU."""
    import jax

    try:
        return jax.devices()
    except Exception as error:  # JAX's backends raise errors of any type, even an AssertionError without a text
        reason = " ".join(str(error).split())[:200] or "this machine has none of that kind"
        asked = f"JAX_PLATFORMS is {show(os.environ.get('JAX_PLATFORMS', ''))}"
        raise UserError(
            f"{asked}: JAX finds no device ({reason}); allowed: cpu, cuda with a GPU, or not set"
        ) from error


def choose_devices(config: Config) -> list:
    """The devices of the run: the same number from each process, in the order of the processes.

    This is the first call that touches a device. All hosts wait for each other here and connect their devices.

    Raises:
      UserError: a host has too few devices, or the configuration does not fit the devices.
    """
    import jax

    from jaxlm.host import together

    together.meet("the prepared data")  # by itself, JAX waits only minutes for the other hosts' devices
    by_process: dict[int, list] = {}
    for device in find_devices():
        by_process.setdefault(device.process_index, []).append(device)
    count = config.parallel.devices or len(by_process[0])
    for process, found in by_process.items():
        if count > len(found) or (not config.parallel.devices and count != len(found)):
            asked = f"parallel.devices is {count}"
            if not config.parallel.devices:
                asked = f"{distributed.name(0)} has {count} devices"
            raise UserError(
                f"{asked}, and {distributed.name(process)} has {len(found)}; allowed: a parallel.devices that every"
                " host has, or 0 where all have the same number"
            )
    check_batch(config, count, jax.process_count())
    devices = [d for process in sorted(by_process) for d in by_process[process][:count]]
    if config.model.attention in ("cudnn", "triton") and devices[0].platform != "gpu":
        raise UserError(
            f"model.attention is {show(config.model.attention)}; allowed on {devices[0].platform}: auto, xla"
        )
    together.connect(devices)
    return devices
