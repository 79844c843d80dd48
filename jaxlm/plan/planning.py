"""The plan of a run: memory, time and communication on a number of devices of one kind."""

import dataclasses
from typing import Any, NamedTuple

from jaxlm.config import Config
from jaxlm.host.memory import resident_bytes
from jaxlm.host.runtime import GPU_MEMORY
from jaxlm.model import make_model, num_params
from jaxlm.plan.compiled import Compiled, compile_step, compiled_devices, devices
from jaxlm.plan.devices import Device
from jaxlm.plan.memory import Memory, plan_memory
from jaxlm.plan.program import parse
from jaxlm.plan.times import StepTime, step_time
from jaxlm.train import trained

ROOMY = 1e15  # bytes; with less memory than a program needs, XLA changes the program
COUNTS = [2**i for i in range(13)]  # devices on the curve


class Plan(NamedTuple):
    config: Config
    device: Device
    count: int  # devices
    compiled: Compiled
    memory: Memory
    time: StepTime
    parameters: int
    flops_per_token: float
    curve: list[tuple[int, float]]  # (devices, seconds of a step with the same batch on each)

    @property
    def usable(self) -> float:
        """Bytes of a device that JAX takes."""
        return GPU_MEMORY * self.device.memory

    @property
    def fits(self) -> bool:
        return self.memory.total <= self.usable

    @property
    def tokens(self) -> int:
        """Tokens of a step on all devices."""
        return self.config.batch_size * self.config.seq_len

    @property
    def rate(self) -> float:
        return rate(self.config, self.device)

    @property
    def mfu(self) -> float:
        """The model's FLOPs, divided by those that the devices could do in the time of a step."""
        return self.tokens * self.flops_per_token / self.count / (self.time.seconds * self.rate)

    @property
    def hours(self) -> float:
        """Hours of the whole run."""
        return self.config.steps * self.time.seconds / 3600

    @property
    def kilowatt_hours(self) -> float:
        """Energy of the whole run, at most; 0 if the device's power is unknown."""
        return self.device.watts * self.count * self.hours / 1000

    def summary(self) -> dict[str, Any]:
        """The numbers of the plan for one line of JSON."""
        seconds = self.time.seconds
        return {
            "device": self.device.name,
            "devices": self.count,
            "compiled_for": self.compiled.platform,
            "parameters": self.parameters,
            "memory_bytes": {**{k: round(v) for k, v in self.memory._asdict().items()},
                             "total": round(self.memory.total), "usable": round(self.usable)},
            "fits": self.fits,
            "step_seconds": seconds,
            "computation_seconds": self.time.computation,
            "waiting_seconds": self.time.waiting,
            "moved_bytes": sum(k.times * k.bytes for k, _ in self.time.kernels),
            "product_flops": sum(k.times * k.flops for k, _ in self.time.kernels),
            "tokens_per_second": self.tokens / seconds,
            "mfu": self.mfu,
            "hours": self.hours,
            "kilowatt_hours": self.kilowatt_hours,
            "collectives": [
                {"kind": e.collective.kind, "where": e.collective.where, "times": e.collective.times,
                 "bytes": e.collective.bytes, "seconds": e.seconds, "beside_seconds": e.beside, "kernels": e.kernels}
                for e in self.time.exchanges
            ],
            "costs": [cost._asdict() for cost in self.time.by_source()[:10]],
            "curve": [
                {"devices": n, "step_seconds": s, "tokens_per_second": self.tokens * n / self.count / s}
                for n, s in self.curve
            ],
        }  # fmt: skip


def rate(config: Config, device: Device) -> float:
    """FLOP/s of the device's products in the dtype of the computation."""
    return device.flops_float32 if config.model.dtype == "float32" else device.flops


def _as_on_gpus(config: Config) -> Config:
    """What a GPU would keep for the backward pass, in a program for CPUs."""
    remat = "elementwise" if config.model.remat == "auto" else config.model.remat
    return dataclasses.replace(config, model=dataclasses.replace(config.model, remat=remat, attention="xla"))


def make_plan(config: Config, device: Device, count: int, vocab_size: int) -> Plan:
    """Compiles the step for some of the devices, and plans for all of them: each has the part of the batch that it has
    among all.
    """
    few = compiled_devices(config, device, count)
    # Few devices hold larger parts than all. If these do not fit, XLA would compute results again to save memory.
    roomy = device if few == count else device._replace(memory=ROOMY)
    on_devices = devices(roomy, few, hosts=max(1, few // device.per_host))
    if device.chip is not None and on_devices[0].platform == "cpu":
        config = _as_on_gpus(config)
    part = dataclasses.replace(config, batch_size=config.batch_size * few // count)
    compiled = compile_step(part, on_devices, vocab_size)
    model = make_model(config.model, vocab_size, config.seq_len, compiled.platform)
    params, program = compiled.params, parse(compiled.text)
    process = resident_bytes() / few if device.chip is None else 0.0  # it has compiled the step, as a run has

    def time(n: int) -> StepTime:
        return step_time(program, device, n, rate(config, device), config.parallel)

    return Plan(
        config=config,
        device=device,
        count=count,
        compiled=compiled,
        memory=plan_memory(config, model, compiled, count, process),
        time=time(count),
        parameters=num_params(params),
        flops_per_token=trained.flops_per_token(config, params),
        curve=[(n, time(n).seconds) for n in (COUNTS if few > 1 else [1]) if n % config.parallel.of_a_replica == 0],
    )
