"""The training step, compiled for devices that need not be there.

With the CUDA plugin installed, XLA compiles for GPUs on a machine that has none. Nothing can be tried there, so each
product is a Triton kernel, where on a GPU XLA would take the fastest of several.
"""

import dataclasses
import importlib.util
import os
from dataclasses import dataclass
from typing import Any

from jaxlm.config import Config
from jaxlm.host import runtime
from jaxlm.plan.devices import Device, target_config


def can_compile_for_gpus() -> bool:
    return importlib.util.find_spec("jax_plugins") is not None and any(
        importlib.util.find_spec(f"jax_plugins.xla_cuda{version}") for version in (12, 13)
    )


def compiled_devices(config: Config, device: Device, count: int) -> int:
    """How many of `count` devices the step is compiled for: those of one host or, if replicas need more, of some."""
    few, each = min(count, device.per_host), config.parallel.of_a_replica
    if few % each == 0 and (few > each or few == count):
        return few
    replicas = count // each
    return each * next((n for n in range(2, replicas + 1) if replicas % n == 0), 1)


def configure(config: Config, device: Device, count: int) -> None:
    """Sets what JAX reads when it is imported, to compile for `count` of these devices. Call it once, before that."""
    config = dataclasses.replace(config, parallel=dataclasses.replace(config.parallel, devices=count))
    os.environ["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] = "1"
    os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
    if device.chip is not None and can_compile_for_gpus():
        os.environ["JAX_PLATFORMS"] = ""  # the plugin is there, and finds no GPU
        flags = runtime.gpu_flags(config, 1)
    else:
        os.environ["JAX_PLATFORMS"] = "cpu"
        flags = [*runtime.cpu_flags(config), f"--xla_force_host_platform_device_count={count}"]
    os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *flags]).strip()


def devices(device: Device, count: int, hosts: int = 1) -> list[Any]:
    """JAX's devices to compile for: `count`, spread over `hosts`; simulated CPUs where GPUs are not possible."""
    import jax
    from jax.experimental import topologies

    if device.chip is None or not can_compile_for_gpus():
        return jax.devices("cpu")[:count]
    topology = f"{hosts}x{count // hosts}x1"
    return topologies.get_topology_desc(platform="cuda", target_config=target_config(device), topology=topology).devices


@dataclass(frozen=True)
class Compiled:
    text: str  # of the program
    arguments: float  # bytes of a device: state and batch
    in_place: float  # of which the results take the place
    temporary: float  # bytes of a device
    state: Any  # shapes of the train state, as the step takes it
    params: Any  # shapes of all parameters
    count: int  # devices
    platform: str  # that the program is for: gpu or cpu


def compile_step(config: Config, devices: list[Any], vocab_size: int) -> Compiled:
    """Compiles the step for the configuration's batch, split over the devices."""

    from jaxlm.model import make_model
    from jaxlm.train import step as train_step
    from jaxlm.train.backward import batch_shapes
    from jaxlm.train.layout import step_shapes

    n = len(devices)
    model = make_model(config.model, vocab_size, config.seq_len)
    state = step_shapes(config, model, n)
    program = train_step.pmap_train_step(config, train_step.make_train_step(config, model, devices), devices)
    rows = config.batch_size * config.parallel.of_a_replica // n
    compiled = program.lower(state, batch_shapes(config, n, rows)).compile()
    found = compiled.memory_analysis()
    return Compiled(
        text=compiled.as_text(),
        arguments=found.argument_size_in_bytes,
        in_place=found.alias_size_in_bytes,
        temporary=found.temp_size_in_bytes,
        state=state,
        params=model.shapes(),
        count=n,
        platform=devices[0].platform,
    )
