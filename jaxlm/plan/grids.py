"""Searches for the fastest way to divide a run among devices: grid, ZeRO, micro-batches and recomputation.

Every way that the configuration admits is estimated; none is compiled. What a layer and a sequence cost comes from
samples (samples.py); what devices send, from the formulas (exchanged.py); and how often a stage of a pipeline works,
from its schedule. The estimate assumes that

- work that T * C devices of a replica share takes each of them a (T * C)-th of the time,
- ZeRO-3 exchanges layers of an unrolled loop beside computation, and devices wait for those of a rolled one, although
  XLA hides a part of them,
- context groups exchange beside attention; tensor groups, pipelines and everything else make devices wait.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxlm.config import Config, ParallelConfig, UserError, flatten
from jaxlm.config.validate import validate
from jaxlm.host.runtime import GPU_MEMORY
from jaxlm.model import Params, attention_flops, make_model, num_params
from jaxlm.model.remat import layer_loop
from jaxlm.plan.compiled import can_compile_for_gpus
from jaxlm.plan.devices import Device
from jaxlm.plan.exchanged import FLOAT, between_replicas, in_replica, layers_run
from jaxlm.plan.samples import Sample, sample
from jaxlm.plan.times import link_of
from jaxlm.train import trained
from jaxlm.train.one_device import OneDevice, one_device
from jaxlm.train.schedule_table import forward_phases, make_table
from jaxlm.train.step import init_whole

MOST_CHUNKS = 8
MOST_CONTEXT = 16
FILLED = 0.9  # least share of the layers of all chunks that a model must have; the others only fill the last ones
MARGIN = 0.95  # share of the memory that an estimate may fill
SIMPLER = 1.02  # how much faster a way must be for each further key that it sets
USUAL = {"tensor": 1, "pipeline": 1, "chunks": 1, "context": 1, "zero": 0}  # keys of `parallel` that are searched


class Estimate(NamedTuple):
    config: Config  # with the keys of this way
    devices: int  # that it uses
    memory: dict[str, float]  # {what a device holds: bytes}
    seconds: dict[str, float]  # {what a device does or waits for in a step: seconds}
    sent: dict[str, float]  # {purpose: bytes that a device sends in a step}

    @property
    def total(self) -> float:
        """Bytes of a device."""
        return sum(self.memory.values())

    @property
    def time(self) -> float:
        """Seconds of a step."""
        return sum(self.seconds.values())

    @property
    def score(self) -> float:
        """By which ways are compared: the time, and a little for each key that makes a run harder to understand."""
        p = self.config.parallel
        return self.time * SIMPLER ** sum(getattr(p, key) != usual for key, usual in USUAL.items())

    def changes(self, config: Config) -> list[str]:
        """The keys in which this way differs from a configuration."""
        keys = [*(f"parallel.{key}" for key in (*USUAL, "overlap")), "optim.accum_steps", "model.remat"]
        mine, given = flatten(self.config), flatten(config)
        return [f"{key}={str(mine[key]).lower()}" for key in keys if mine[key] != given[key]]


def search(config: Config, device: Device, most: int, vocab_size: int) -> list[Estimate]:
    """The ways that fit on up to `most` devices, the best first; of each grid the best one."""
    return Search(config, device, most, vocab_size).best()


def _powers(first: int, last: int) -> list[int]:
    return [2**i for i in range(first.bit_length() - 1, last.bit_length()) if 2**i <= last]


def divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


class Search:
    """The ways to divide a run among up to `most` devices. ZeRO-2 is left out: ZeRO-3 holds less, for little more."""

    def __init__(self, config: Config, device: Device, most: int, vocab_size: int):
        self.config, self.device, self.most, self.vocab_size = config, device, most, vocab_size
        self.platform = "gpu" if device.chip and can_compile_for_gpus() else "cpu"
        self.model = make_model(config.model, vocab_size, config.seq_len, self.platform)
        # {what is done: the key's value}, first without recomputation of products. What the configuration does anyway
        # on this platform keeps its value, so that it is no change.
        given = {layer_loop(config.model, "gpu" if device.chip else "cpu")[1]: config.model.remat}
        self.remats = list(({"elementwise": "elementwise", "full": "full"} | given).values())
        self._found: dict[tuple[int, ...], tuple[OneDevice, dict[str, float]]] = {}
        whole = self.model.shapes()
        self.layer = num_params(whole["layers"]) / config.model.num_layers
        self.attention = attention_flops(config.model, config.seq_len) / trained.flops_per_token(config, whole)
        self.state = _bytes_per_parameter(config, whole)
        self.sample: Callable[[str, bool], Sample] = functools.cache(
            lambda remat, context: sample(config, device, vocab_size, remat, context)
        )

    def best(self) -> list[Estimate]:
        """The ways that fit, the best first; of each grid the best one.

        Devices share sequences only where nothing else fits or where there are more devices than sequences, and more of
        them as long as that is faster.
        """
        found: list[Estimate] = []
        least = math.inf
        for context in _powers(1, MOST_CONTEXT):
            more = self.fitting(context)
            found += more
            fastest = min((e.score for e in more), default=math.inf)
            if found and (fastest >= least or self.config.batch_size >= self.most):
                break
            least = min(least, fastest)
        best: dict[tuple[int, ...], Estimate] = {}
        for e in sorted(found, key=lambda e: e.score):
            p = e.config.parallel
            best.setdefault((p.tensor, p.pipeline, p.context, p.zero), e)
        return list(best.values())

    def fitting(self, context: int) -> list[Estimate]:
        """The estimates of all ways that fit, with this many devices in a context group."""
        limit = MARGIN * GPU_MEMORY * self.device.memory
        found = []
        for way, devices in self._ways(context):
            p = way.parallel
            own, between = self._replicas(way, devices)
            rows = way.batch_size // own.grid.size("data")  # of a replica
            if sum(self._held(p, own).values()) > limit:
                continue
            for each in reversed(divisors(rows)):
                estimate = self._estimate(_with_micro_batches(way, rows // each), own, each, between)
                if estimate.total <= limit:
                    found.append(estimate)
                    if p.pipeline == 1:
                        break  # smaller micro-batches are not faster
        return found

    def _replicas(self, way: Config, devices: int) -> tuple[OneDevice, dict[str, float]]:
        """What a device holds, and the bytes that replicas exchange in a step of one micro-batch."""
        p = way.parallel
        key = p.tensor, p.pipeline, p.context, p.zero, p.chunks * p.layers_of_chunk(way.model.num_layers), devices
        if key not in self._found:
            own = one_device(way, self.model, devices, self.platform)
            self._found[key] = own, between_replicas(_with_micro_batches(way, 1), own)
        return self._found[key]

    def _ways(self, context: int) -> Iterator[tuple[Config, int]]:
        """Yields configurations that are allowed, and how many devices they use."""
        layers = self.config.model.num_layers
        tensors, pipelines = divisors(self.device.per_host), range(1, layers + 1)
        for tensor, pipeline in itertools.product(tensors, pipelines):
            most = min(-(-layers // pipeline), MOST_CHUNKS) if pipeline > 1 else 1
            parts = {c: pipeline * c for c in range(1, most + 1)}
            chunks = [c for c, n in parts.items() if layers >= FILLED * n * -(-layers // n)]
            devices = self._devices(tensor * pipeline * context)
            if not devices or not chunks:
                continue
            copies = devices // (tensor * pipeline)
            zeros = [0, 1] if pipeline > 1 else [0, 1, 3]
            for c, zero, remat in itertools.product(chunks, zeros if copies > 1 else [0], self.remats):
                grid = {"tensor": tensor, "pipeline": pipeline, "chunks": c, "context": context, "zero": zero}
                if (way := _allowed(self.config, grid, remat)) is not None:
                    yield way, devices

    def _devices(self, each: int) -> int:
        """The most devices on which replicas of this many share the batch and fill hosts; 0 = none."""
        host = self.device.per_host
        for replicas in range(min(self.most // each, self.config.batch_size), 0, -1):
            count = replicas * each
            if self.config.batch_size % replicas == 0 and (count <= host or count % host == 0):
                return count
        return 0

    def _estimate(self, way: Config, own: OneDevice, rows: int, between: dict[str, float]) -> Estimate:
        """Args: rows: of a micro-batch; between: bytes between replicas with one micro-batch."""
        times = way.optim.accum_steps if way.parallel.zero > 1 else 1
        sent = {name: times * size for name, size in between.items()} | in_replica(way, own)
        seconds = self._computation(way, own, rows)
        seconds |= self._waiting(way, own, sent, seconds)
        return Estimate(way, own.grid.count, self._memory(way, own, rows), seconds, sent)

    def _computation(self, way: Config, own: OneDevice, rows: int) -> dict[str, float]:
        p, m, layers = way.parallel, way.optim.accum_steps, way.model.num_layers
        s = self.sample(way.model.remat, p.context > 1).seconds
        shared = rows / (p.tensor * p.context)
        state = (s.fixed + s.layer * layers) / (p.tensor * p.pipeline) / (own.grid.copies.size if p.zero else 1)
        held = num_params(own.params)
        adding = 3 * FLOAT * held / self.device.bandwidth  # reads two gradients, and writes their sum
        adding /= own.grid.copies.size if p.zero > 1 else 1
        if p.pipeline == 1:
            work = m * shared * (s.row + s.layer_row * layers) + (m - 1) * adding
            return {"computation": state + work}
        forward = self.sample(self.remats[0], p.context > 1).seconds.layer_row / 3  # of it, two thirds are backward
        of_chunk = p.layers_of_chunk(way.model.num_layers)
        outer = 3 * FLOAT * num_params({k: x for k, x in own.params.items() if k != "layers"}) / self.device.bandwidth
        phase = shared * of_chunk * (forward + s.layer_row) + (adding - outer) / p.chunks + outer
        phases, useful = forward_phases(p.pipeline, m, p.chunks), m * p.chunks
        return {"computation": state + useful * phase + m * shared * s.row, "bubble": (phases - useful) * phase}

    def _waiting(self, way: Config, own: OneDevice, sent: dict[str, float], done: dict[str, float]) -> dict[str, float]:
        """Seconds in which a device waits, by direction."""
        p, count, computation = way.parallel, own.grid.count, done["computation"]
        leaves = len(jax.tree.leaves(own.params["layers"]))
        runs = layers_run(way)

        def seconds(direction: str, size: float, collectives: float) -> float:
            link = link_of(direction, self.device, count, p)
            return size / link.bandwidth + collectives * link.latency if size else 0.0

        often = 3 * leaves * runs if p.zero > 1 else 2
        data = seconds("data", sent["gradients"] + sent.get("parameters", 0), often)
        if p.zero > 1 and way.model.scan_unroll == 0:
            data = max(0.0, data - computation)
        context = seconds("context", sent.get("context", 0), 3 * p.context * runs)
        found = {
            "data": data,
            "tensor": seconds("tensor", sent.get("tensor", 0) + sent.get("copies", 0), 8 * runs),
            "context": max(0.0, context - computation * self.attention),
            "pipeline": seconds("pipeline", sent.get("pipeline", 0), 2 * way.optim.accum_steps * p.chunks),
        }
        return {name: x for name, x in found.items() if x}

    def _memory(self, way: Config, own: OneDevice, rows: int) -> dict[str, float]:
        p, m = way.parallel, way.optim.accum_steps
        found = self.sample(way.model.remat, p.context > 1)
        held = num_params(own.params)
        shared, low = rows / (p.tensor * p.context), jnp.dtype(way.model.dtype).itemsize
        kept = shared * (found.kept.row + found.kept.layer_row * p.layers_of_chunk(way.model.num_layers))
        working = found.working.fixed / p.tensor + shared * found.working.row
        if p.pipeline > 1:
            working += FLOAT * held / p.chunks  # the gradient of a chunk
            kept += _slots(p.schedule, p.pipeline, m, p.chunks) * shared * way.seq_len * way.model.d_model * low
        if p.zero > 1:
            outer = num_params(own.params) - self.layer * way.model.num_layers / p.tensor
            working += outer * (low + FLOAT) + 2 * self.layer / p.tensor * (low + FLOAT)  # two layers
        elif m > 1 and low < FLOAT:
            working += low * held  # parameters in the dtype of the computation, converted once
        return self._held(p, own) | {"kept": kept, "working": working}

    def _held(self, p: ParallelConfig, own: OneDevice) -> dict[str, float]:
        """Bytes of the state and the gradient."""
        copies, held = own.grid.copies.size, num_params(own.params)
        return {
            "parameters": self.state["params"] * held / (copies if p.zero > 2 else 1),
            "optimizer": self.state["opt_state"] * held / (copies if p.zero else 1),
            "average": self.state["ema"] * held / (copies if p.zero > 2 else 1),
            "gradients": FLOAT * num_params(trained.part(self.config, own.params)) / (copies if p.zero > 1 else 1),
        }


@functools.cache
def _slots(schedule: str, stages: int, micro: int, chunks: int) -> int:
    """Inputs that a stage keeps; after some rounds of micro-batches they are no more (gpipe: all of them)."""
    few = micro if schedule == "gpipe" else min(micro, 4 * stages)
    return make_table(schedule, stages, few, chunks).slots


def _with_micro_batches(config: Config, count: int) -> Config:
    return dataclasses.replace(config, optim=dataclasses.replace(config.optim, accum_steps=count))


def _allowed(config: Config, grid: dict[str, Any], remat: str) -> Config | None:
    """The configuration with this grid; None = it is not allowed."""
    overlap = config.parallel.overlap and grid["pipeline"] == 1
    way = dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, remat=remat),
        parallel=dataclasses.replace(config.parallel, **grid, overlap=overlap),
    )
    try:
        return validate(way)
    except UserError:
        return None


def _bytes_per_parameter(config: Config, params: Params) -> dict[str, float]:
    """{field of the state: bytes for each parameter}"""
    state = jax.eval_shape(lambda params: init_whole(config, params), params)
    sizes = {f: jax.tree.leaves(getattr(state, f)) for f in ("params", "opt_state", "ema")}
    return {f: sum(math.prod(x.shape) * x.dtype.itemsize for x in xs) / num_params(params) for f, xs in sizes.items()}
