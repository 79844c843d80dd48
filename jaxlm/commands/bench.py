"""Measures how fast a configuration trains: the step alone, the whole trainer around it, and nanoGPT beside them.

What is compared takes turns, round by round, and the results are medians, so that a noisy machine disturbs all alike.
The last line of output is one JSON object. `jaxlm bench data` measures how fast data is prepared and fed, `jaxlm bench
comm` reads what a step moves between devices; each has --help.
"""

import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from jaxlm.config import Config, UserError, cli, files
from jaxlm.config.paths import user_path
from jaxlm.host import runtime, signals
from jaxlm.host.temporary import temporary_folder


def main(argv: list[str]) -> int:
    if argv[:1] == ["data"]:
        from jaxlm.commands import bench_data

        return bench_data.main(argv[1:])
    if argv[:1] == ["comm"]:
        from jaxlm.commands import bench_comm

        return bench_comm.main(argv[1:])
    parser = cli.config_parser("jaxlm bench", __doc__)
    parser.add_argument("--steps", type=int, default=20, help="optimizer steps per round (default: 20)")
    parser.add_argument("--rounds", type=int, default=5, help="number of rounds (default: 5)")
    parser.add_argument(
        "--nanogpt", type=Path, metavar="DIR", help="a checkout of nanoGPT, whose step takes turns with ours"
    )
    parser.add_argument(
        "--nanogpt_python", default=sys.executable, metavar="PYTHON", help="a Python with torch (default: this one)"
    )
    args, overrides = parser.parse_known_args(argv)
    config = files.load(user_path("--config", args.config), overrides)
    for name in ("steps", "rounds"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name} is {getattr(args, name)}; allowed: 1 or more")
    config.steps = 10**9  # never reached
    config.log.every_steps = 10
    # So that parameters hardly move: otherwise the step alone would memorize its one batch, and all other batches would
    # be spikes.
    config.optim.lr = config.optim.adam_lr = config.optim.embed_lr = 1e-9
    runtime.check_batch(config, config.parallel.devices or 1, 1)
    runtime.configure_jax(config, 1)
    with temporary_folder() as folder:
        ours = Trainer(config, folder)
        peer = NanoGPT(args.nanogpt, args.nanogpt_python, config, ours.vocab_size) if args.nanogpt else None
        rounds: dict[str, list[float]] = {"step": [], "trainer": [], "nanogpt": []}
        timers = {"step": ours.step_alone, "trainer": ours.with_trainer} | ({"nanogpt": peer.step} if peer else {})
        for i in range(args.rounds):
            # In alternating order, because what ran before leaves traces.
            for name in list(timers)[:: 1 if i % 2 else -1]:
                rounds[name].append(timers[name](args.steps))
            print(
                f"round {i + 1}/{args.rounds} · "
                + " · ".join(f"{k} {v[-1] * 1e3:.2f} ms" for k, v in rounds.items() if v)
            )
        ours.close()
    if peer:
        peer.close()
    print(json.dumps(summary(ours, rounds)))
    return 0


def summary(ours: "Trainer", rounds: dict[str, list[float]]) -> dict[str, Any]:
    """Returns medians over the rounds; a ratio is the median of the ratios within each round."""
    from jaxlm.model import flops_per_token
    from jaxlm.run.metrics import peak_flops

    c = ours.config
    step = statistics.median(rounds["step"])
    rate = c.batch_size * c.seq_len / statistics.median(rounds["trainer"])
    flops = flops_per_token(c.model, ours.state.params, c.seq_len)
    peak = peak_flops(ours.parts.devices[0].device_kind)
    result = {
        "devices": f"{len(ours.parts.devices)} x {ours.parts.devices[0].device_kind}",
        "compile_seconds": round(ours.compile_seconds, 2),
        "step_ms": step * 1e3,
        "trainer_ms": statistics.median(rounds["trainer"]) * 1e3,
        "trainer_over_step": statistics.median(b / a for a, b in zip(rounds["step"], rounds["trainer"], strict=True)),
        "tokens_per_second": rate,
        "model_flops_per_second": rate * flops,
        "mfu": rate * flops / peak / len(ours.parts.devices) if peak else None,
        "peak_memory_bytes": ours.peak_memory(),
    }
    if rounds["nanogpt"]:
        result["nanogpt_step_ms"] = statistics.median(rounds["nanogpt"]) * 1e3
        for name in ("step", "trainer"):
            ratios = [a / b for a, b in zip(rounds[name], rounds["nanogpt"], strict=True)]
            result[f"{name}_over_nanogpt"] = statistics.median(ratios)
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
    """The trainer of a configuration, in a temporary workdir."""

    def __init__(self, config: Config, workdir: Path):
        import jax

        from jaxlm.checkpoint.workdirs import Lock
        from jaxlm.run.begin import begin
        from jaxlm.run.step_report import make_log

        self.config = config
        self.parts, self.state, _ = begin(config, workdir, Lock(), quiet=True)
        self.vocab_size = self.parts.corpus.vocab_size
        self._write = make_log(self.parts, 0)
        self._step = self.parts.train_step()
        self._stream = self.parts.train_batches(self.parts.order, 0)
        self._batch = jax.device_put(next(self._stream), self.parts.placement.batch)
        self._done = 0
        start = time.perf_counter()
        self.step_alone(1)
        self.compile_seconds = time.perf_counter() - start
        first, second = warm_up_steps(self.step_alone(1))
        print(f"compiled in {self.compile_seconds:.1f} s; warming up with {first + second} steps", flush=True)
        self.with_trainer(first)  # until the data pipeline works in the background
        self._stream.settle()
        self.with_trainer(second)

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

        on_step = make_on_step(self.parts, self._write, self.state.params, self._done)
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
        stats = [d.memory_stats() or {} for d in self.parts.placement.local]
        device = max(s.get("peak_bytes_in_use", 0) for s in stats)
        unit = 1 if sys.platform == "darwin" else 1024
        return device or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit

    def close(self) -> None:
        self._stream.close()
        self.parts.saver.close()


class NanoGPT:
    """nanoGPT's model and optimizer, with the same sizes, in a process of its own that makes steps on request."""

    def __init__(self, checkout: Path, python: str, config: Config, vocab_size: int):
        m = config.model
        if not (checkout / "model.py").is_file():
            raise UserError(f"--nanogpt {checkout}: no model.py in it; allowed: a checkout of nanoGPT")
        sizes = {
            "n_layer": m.num_layers,
            "n_head": m.num_heads,
            "n_embd": m.d_model,
            "block_size": config.seq_len,
            "vocab_size": vocab_size,
            "bias": m.use_bias,
            "dropout": m.dropout,
        }
        precision = "medium" if runtime.rounds_products(config) else "highest"
        script = Path(__file__).with_name("bench_nanogpt.py")
        command = [python, script, checkout, json.dumps(sizes), str(config.batch_size), precision]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        signals.at_stop(self._process.kill)
        self.step(1)  # compiles, if it does
        self.step(max(1, min(4, int(20 / self.step(1)))))  # for at most 20 seconds

    def step(self, steps: int) -> float:
        assert self._process.stdin and self._process.stdout
        try:
            self._process.stdin.write(f"{steps}\n")
            self._process.stdin.flush()
            while not (line := self._process.stdout.readline()).startswith("seconds "):
                if not line:
                    raise OSError("it ended early")
            return float(line.split()[1])
        except OSError as error:
            raise UserError(
                f"--nanogpt: its process failed ({error}); see above; allowed: a Python with torch"
            ) from error

    def close(self) -> None:
        assert self._process.stdin
        self._process.stdin.close()
        self._process.wait()
