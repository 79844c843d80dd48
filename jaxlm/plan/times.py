"""How long a step takes, by a roofline over its kernels and a model of its collectives.

A kernel takes the longer of two times: its products at the rate that a device reaches, and its bytes at the memory's
bandwidth (Williams et al., Roofline). Kernels run one after another. A collective of B bytes over N devices takes

    latency * steps + sent(N) * B / bandwidth

where a ring sends 2 (N - 1) / N of B in an all-reduce, and half of that in the others. Inside a host it has N - 1
steps; between hosts, in a tree, the logarithm of their number. What runs between its start and its end hides it.
"""

import math
from typing import NamedTuple

from jaxlm.config import ParallelConfig
from jaxlm.plan.collectives import SENT, Collective, read
from jaxlm.plan.devices import LATENCY, NETWORK, REACHED, Device
from jaxlm.plan.kernels import COLLECTIVES, Kernel, Step, kernel_of, walk
from jaxlm.plan.program import Program


class Exchange(NamedTuple):
    """A collective of the plan."""

    collective: Collective
    seconds: float  # each time
    beside: float  # seconds of kernels that run between its start and its end, each time
    kernels: int  # number of these kernels

    @property
    def exposed(self) -> float:
        """Seconds that the step waits for it, each time."""
        return max(0.0, self.seconds - self.beside)


class Cost(NamedTuple):
    """What the kernels of one line cost in a step."""

    source: str  # file:line
    seconds: float
    bytes: float
    flops: float


class StepTime(NamedTuple):
    kernels: list[tuple[Kernel, float]]  # with the seconds of each, each time
    exchanges: list[Exchange]

    @property
    def computation(self) -> float:
        return sum(kernel.times * seconds for kernel, seconds in self.kernels)

    @property
    def waiting(self) -> float:
        return sum(e.collective.times * e.exposed for e in self.exchanges)

    @property
    def seconds(self) -> float:
        return self.computation + self.waiting

    def by_source(self) -> list["Cost"]:
        """What each line costs in a step, the most expensive first."""
        found: dict[str, Cost] = {}
        for k, seconds in self.kernels:
            c = found.get(k.source, Cost(k.source, 0.0, 0.0, 0.0))
            found[k.source] = Cost(
                k.source, c.seconds + k.times * seconds, c.bytes + k.times * k.bytes, c.flops + k.times * k.flops
            )
        return sorted(found.values(), key=lambda cost: -cost.seconds)


def step_time(
    program: Program, device: Device, count: int, rate: float, parallel: ParallelConfig | None = None
) -> StepTime:
    """The time of a step on `count` devices, from the program compiled for some of them.

    Args:
      rate: FLOP/s of the device's products in the dtype of the computation.
      parallel: how they divide the model and sequences; None = not at all.
    """
    found = StepTime([], [])
    seconds = number = 0.0  # of all kernels so far, in the whole step
    started: dict[str, tuple[Step, float, float]] = {}  # by name: asynchronous collectives that have not ended
    for step in walk(program):
        i = step.instruction
        if i.op.startswith(COLLECTIVES):
            if i.op.endswith("-start"):
                started[i.name] = step, seconds, number
                continue
            start, *before = started.pop(i.operands[0]) if i.op.endswith("-done") else (step, seconds, number)
            c = read(start)
            found.exchanges.append(
                Exchange(
                    c,
                    seconds=exchange_seconds(c, device, count, parallel),
                    beside=(seconds - before[0]) / c.times,
                    kernels=round((number - before[1]) / c.times),
                )
            )
        else:
            kernel = kernel_of(program, step)
            each = max(kernel.bytes / device.bandwidth, kernel.flops / (REACHED * rate))
            found.kernels.append((kernel, each))
            seconds, number = seconds + step.times * each, number + step.times
    return found


def group_of(direction: str, count: int, parallel: ParallelConfig | None) -> tuple[int, int]:
    """How many of `count` devices exchange in this direction, and how far apart on the axis neighbours are."""
    if parallel is None:
        return count, 1
    p = parallel
    inner = {"tensor": (p.tensor, 1), "context": (p.context, p.tensor), "pipeline": (2, p.context * p.tensor)}
    return inner.get(direction, (count // (p.pipeline * p.tensor), p.pipeline * p.tensor))


def exchange_seconds(c: Collective, device: Device, count: int, parallel: ParallelConfig | None = None) -> float:
    """The time of a collective of a step of `count` devices."""
    link = link_of(c.direction, device, count, parallel)
    if link.size == 1:
        return 0.0
    return link.latency * (2 if c.kind == "all-reduce" else 1) + SENT[c.kind](link.size) * c.bytes / link.bandwidth


class Link(NamedTuple):
    size: int  # devices that exchange
    bandwidth: float  # bytes/s that a device sends
    latency: float  # seconds of a collective that goes around once


def link_of(direction: str, device: Device, count: int, parallel: ParallelConfig | None = None) -> Link:
    """What connects the devices that exchange in a direction."""
    size, apart = group_of(direction, count, parallel)
    inside = min(size, max(1, device.per_host // apart))
    if direction == "pipeline" and parallel and parallel.of_a_replica > device.per_host:
        inside = 1  # some neighbours are on different hosts, and all wait for those
    hosts = math.ceil(size / inside)
    # Each device has a network card of its own, and a ring through all devices leaves a host once: rings in parallel,
    # as many as there are cards, use all of them.
    bandwidth = device.link if hosts == 1 else min(device.link, NETWORK * inside)
    return Link(size, bandwidth, (inside - 1) * LATENCY["link"] + math.ceil(math.log2(hosts)) * LATENCY["network"])
