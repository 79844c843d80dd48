"""Measures how fast a configuration trains: the step alone, the whole trainer around it, and PyTorch beside them.

What is compared takes turns, round by round, and the results are medians, so that a noisy machine disturbs all alike.
The last line of output is one JSON object. `jaxlm bench data` measures how fast data is prepared and fed, `jaxlm bench
comm` reads what a step moves between devices; each has --help.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from jaxlm.commands import plan_variants
from jaxlm.commands.bench_peers import Peer, check_torch, nanogpt, pytorch
from jaxlm.config import Config, UserError, cli, files
from jaxlm.config.paths import user_path
from jaxlm.host import memory, runtime
from jaxlm.host.temporary import temporary_folder
from jaxlm.plan import devices as known


def main(argv: list[str]) -> int:
    if argv[:1] == ["data"]:
        from jaxlm.commands import bench_data

        return bench_data.main(argv[1:])
    if argv[:1] == ["comm"]:
        from jaxlm.commands import bench_comm

        return bench_comm.main(argv[1:])
    parser = make_parser()
    args, overrides = parser.parse_known_args(argv)
    for name in ("steps", "rounds"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name} is {getattr(args, name)}; allowed: 1 or more")
    if args.grid:
        from jaxlm.commands import bench_sweep

        return bench_sweep.sweep(args, overrides)
    if args.html:
        raise UserError("--html is given without --grid; allowed: both, because the page shows a sweep")
    config = files.load(user_path("--config", args.config), overrides)
    if args.torch:
        check_torch(config)
    config.steps = 10**9  # never reached
    config.log.every_steps = 10
    # So that parameters hardly move: otherwise the step alone would memorize its one batch, and all other batches would
    # be spikes.
    config.optim.lr = config.optim.adam_lr = config.optim.embed_lr = 1e-9
    runtime.check_batch(config, config.parallel.devices, 1)
    if args.torch or args.nanogpt:
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # a GPU holds the other trainer, too
    runtime.configure_jax(config, 1)
    from jaxlm.model import num_params

    with temporary_folder() as folder:
        ours = Trainer(config, folder, ["--config", args.config, *overrides])
        peers: dict[str, Peer] = {}
        if args.nanogpt:
            peers["nanogpt"] = nanogpt(args.nanogpt, args.python, config, ours.vocab_size)
        if args.torch:
            ours.check_one_gpu()
            peers["torch"] = pytorch(args.python, config, ours.vocab_size, num_params(ours.state.params))
        timers = {"step": ours.step_alone, "trainer": ours.with_trainer} | {k: p.step for k, p in peers.items()}
        rounds: dict[str, list[float]] = {name: [] for name in timers}
        for i in range(args.rounds):
            # In alternating order, because what ran before leaves traces.
            for name in list(timers)[:: 1 if i % 2 else -1]:
                rounds[name].append(timers[name](args.steps))
            shown = " · ".join(f"{name} {seconds[-1] * 1e3:.2f} ms" for name, seconds in rounds.items())
            print(f"round {i + 1}/{args.rounds} · {shown}")
        ours.close()
    for peer in peers.values():
        peer.close()
    print(json.dumps(summary(ours, rounds, {name: peer.peak_bytes for name, peer in peers.items()})))
    return 0


def make_parser() -> argparse.ArgumentParser:
    parser = cli.config_parser("jaxlm bench", __doc__)
    parser.add_argument("--steps", type=int, default=20, help="optimizer steps per round (default: 20)")
    parser.add_argument("--rounds", type=int, default=5, help="number of rounds (default: 5)")
    parser.add_argument(
        "--nanogpt", type=Path, metavar="DIR", help="a checkout of nanoGPT, whose step takes turns with ours"
    )
    parser.add_argument(
        "--torch", action="store_true", help="the same model in PyTorch takes turns: SDPA, on GPUs compiled"
    )
    parser.add_argument("--python", default=sys.executable, help="a Python with torch (default: this one)")
    parser.add_argument(
        "--grid",
        action="append",
        metavar="KEY=A,B",
        help="measures each of these values, with several --grid all combinations, each in a process of its own;"
        " KEY is one of the configuration's, or config",
    )
    parser.add_argument("--html", type=Path, metavar="FILE", help="writes the sweep of --grid as a page for a browser")
    return parser


def summary(ours: "Trainer", rounds: dict[str, list[float]], peaks: dict[str, int]) -> dict[str, Any]:
    """Returns medians and ranges over the rounds; a ratio is the median of the ratios within each round.

    Args:
      peaks: the peak bytes of other trainers; 0 = unknown.
    """
    from jaxlm.run.metrics import peak_flops
    from jaxlm.train import trained

    c, devices, plan = ours.config, ours.parts.devices, ours.planned
    rate = c.batch_size * c.seq_len / statistics.median(rounds["trainer"])
    flops = trained.flops_per_token(c, ours.state.params)
    peak = peak_flops(devices[0].device_kind)
    result: dict[str, Any] = {
        "devices": f"{len(devices)} x {devices[0].device_kind}",
        "compile_seconds": round(ours.compile_seconds, 2),
        "trainer_over_step": statistics.median(b / a for a, b in zip(rounds["step"], rounds["trainer"], strict=True)),
        "tokens_per_second": rate,
        "model_flops_per_second": rate * flops,
        "mfu": rate * flops / peak / len(devices) if peak else None,
        "peak_memory_bytes": ours.peak_memory(),
        "planned_step_ms": plan["step_seconds"] * 1e3 if plan else None,
        "planned_memory_bytes": ours.share(plan["memory_bytes"]["total"]) if plan else None,
    }
    for name, seconds in rounds.items():
        key = name if name in ("step", "trainer") else f"{name}_step"
        result[f"{key}_ms"] = statistics.median(seconds) * 1e3
        result[f"{key}_ms_range"] = [min(seconds) * 1e3, max(seconds) * 1e3]
    for peer, bytes_ in peaks.items():
        result[f"{peer}_peak_memory_bytes"] = bytes_ or None
        for name in ("step", "trainer"):
            ratios = [a / b for a, b in zip(rounds[name], rounds[peer], strict=True)]
            result[f"{name}_over_{peer}"] = statistics.median(ratios)
    return result


def warm_up_steps(seconds: float) -> tuple[int, int]:
    """Returns how many steps to warm up with before and after the data pipeline settles: 80 and 20, or as many as take
    45 seconds, one at least.

    Args:
      seconds: of a step.
    """
    fit = int(45 / max(seconds, 1e-6))
    return max(1, min(80, fit * 4 // 5)), max(1, min(20, fit // 5))


class Trainer:
    """The trainer of a configuration, in a temporary workdir, and its plan.

    Args:
      arguments: the configuration as arguments of `jaxlm plan`.
    """

    def __init__(self, config: Config, workdir: Path, arguments: list[str]):
        import jax

        from jaxlm.checkpoint.workdirs import Lock
        from jaxlm.run.begin import begin
        from jaxlm.run.step_report import make_log

        self.config = config
        self.planned: dict[str, Any] | None = None
        self.parts, self.state, _ = begin(config, workdir, Lock(), quiet=True)
        self.vocab_size = self.parts.corpus.vocab_size
        plan, on_cpu = self._start_plan(arguments), self.parts.devices[0].platform == "cpu"
        if plan and on_cpu:  # before this process computes, because the plan measures what the CPU reaches
            self.planned = plan_variants.finished(plan)
        self._write = make_log(self.parts, 0)
        self._step = self.parts.train_step()
        self._stream = self.parts.train_batches(self.parts.order, 0)
        self._batch = jax.device_put(next(self._stream), self.parts.placement.batch)
        self._done = 0
        start = time.perf_counter()
        self.step_alone(1)
        self.compile_seconds = time.perf_counter() - start
        if plan and not on_cpu:
            self.planned = plan_variants.finished(plan)
        first, second = warm_up_steps(self.step_alone(1))
        print(f"compiled in {self.compile_seconds:.1f} s; warming up with {first + second} steps", flush=True)
        self.with_trainer(first)  # until the data pipeline works in the background
        self._stream.settle()
        self.with_trainer(second)

    def _start_plan(self, arguments: list[str]) -> subprocess.Popen[str] | None:
        """Plans the same step in another process, while this one compiles it; None for a device without a plan."""
        name, count = known.name_of(self.parts.devices[0].device_kind), len(self.parts.devices)
        if name is None or count % min(count, known.DEVICES[name].per_host if name in known.DEVICES else count):
            return None
        size = ["--vocab_size", str(self.vocab_size)]
        return plan_variants.start([*arguments, *size, "--devices", str(count), "--device", name])

    def check_one_gpu(self) -> None:
        """Raises UserError if there are several GPUs, of which PyTorch's step would use one."""
        if (count := len(self.parts.devices)) > 1 and self.parts.devices[0].platform == "gpu":
            raise UserError(f"parallel.devices is {count}; allowed with --torch: 1")

    def share(self, planned: float) -> float:
        """The planned bytes of what `peak_memory` measures: a GPU's, or those of all CPU devices together."""
        return planned * (len(self.parts.devices) if self.parts.devices[0].platform == "cpu" else 1)

    def step_alone(self, steps: int) -> float:
        """Returns seconds per step, on a batch that is on the devices already."""
        import jax

        start, before = time.perf_counter(), None
        for _ in range(steps):
            self.state, metrics = self._step(self.state, self._batch)
            if before is not None:
                jax.block_until_ready(before)
            before = metrics
        jax.block_until_ready(self.state)
        return (time.perf_counter() - start) / steps

    def with_trainer(self, steps: int) -> float:
        """Returns seconds per step of the whole loop, with data and metrics."""
        import jax

        from jaxlm.run.step_report import make_on_step
        from jaxlm.train.loop import train

        on_step = make_on_step(self.parts, self._write, self._done)
        start = time.perf_counter()
        self.state, self._done = train(
            self.state,
            self._step,
            self._stream,
            start=self._done,
            steps=self._done + steps,
            sharding=self.parts.placement.batch,
            on_step=on_step,
            hooks=[],
        )
        jax.block_until_ready(self.state)
        return (time.perf_counter() - start) / steps

    def peak_memory(self) -> int:
        """Returns the peak bytes of the fullest device if devices report them, else of this process."""
        return memory.peak_of(self.parts.placement.local)

    def close(self) -> None:
        self._stream.close()
        self.parts.saver.close()
