"""Runs a configuration with faults, and compares the results with an undisturbed run; for chaos.py."""

import dataclasses
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jaxlm.config import Config
from jaxlm.config.paths import steps_in
from jaxlm.host import signals

CHILD = Path(__file__).with_name("chaos_child.py")
TIMES = {"time", "tokens_per_second", "step_seconds", "mfu", "peak_memory_bytes"}
LIMIT = 600.0  # seconds; a run that takes longer to end has broken a promise


class Broken(Exception):
    """A promise is broken."""


@dataclasses.dataclass
class Bench:
    """What all faults share: the command, and facts of the undisturbed run."""

    config: Config
    command: list[str]
    folder: Path
    draw: random.Random
    counts: dict[str, int] = dataclasses.field(default_factory=dict)  # file operations of the undisturbed run
    seconds: float = 0.0  # duration of the undisturbed run
    startup: float = 0.0  # seconds of it before the first step

    def start(self, name: str, plan: dict[str, Any], *overrides: str) -> subprocess.Popen[str]:
        workdir, cache = self.folder / name, self.folder / f"{name}-cache"
        env = os.environ | {
            "CHAOS": json.dumps(plan),
            "CHAOS_WORKDIR": str(workdir),
            "CHAOS_CACHE": str(cache),
            "CHAOS_LOG": str(self.folder / f"{name}.log"),
        }
        command = [sys.executable, str(CHILD), *self.command, "--workdir", str(workdir)]
        process = subprocess.Popen(
            [*command, f"--config.data.cache_dir={cache}", *overrides],
            env=env,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        signals.at_stop(process.kill)
        return process

    def finish(self, name: str, plan: dict[str, Any], want: int, *overrides: str) -> tuple[str, str]:
        """Runs a plan to its end. Returns stdout and stderr."""
        return self.end(self.start(name, plan, *overrides), want)

    def end(self, process: subprocess.Popen[str], *want: int) -> tuple[str, str]:
        try:
            out, error = process.communicate(timeout=LIMIT)
        except subprocess.TimeoutExpired:
            process.kill()
            raise Broken(f"did not end within {LIMIT:.0f} s: {process.communicate()[1][-500:]}") from None
        signals.settle()  # a process killed because of a signal broke no promise
        if process.returncode not in want:
            raise Broken(f"exit code {process.returncode} instead of {want}: {error.strip()[-500:]}")
        return out, error

    def log(self, name: str) -> list[dict[str, Any]]:
        path = self.folder / f"{name}.log"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def metrics(self, name: str) -> list[dict[str, Any]]:
        path = self.folder / name / "metrics.jsonl"
        lines = path.read_text().split("\n")[:-1] if path.exists() else []
        return [{k: v for k, v in json.loads(line).items() if k not in TIMES} for line in lines]

    def checkpoints(self, name: str) -> list[int]:
        folder = self.folder / name / "checkpoints"
        return steps_in(folder)

    def wait_for(self, process: subprocess.Popen[str], true: Callable[[], bool]) -> bool:
        """Waits until `true()` holds, for at most LIMIT. Returns False if the process or that time ends first."""
        deadline = time.monotonic() + LIMIT
        while process.poll() is None and time.monotonic() < deadline:
            if true():
                return True
            time.sleep(0.005)
        return False

    def same(self, name: str) -> None:
        """Raises Broken unless a run has the results of the undisturbed one."""
        ours, whole = self.metrics(name), self.metrics("whole")
        if ours != whole:
            wrong = next(
                (pair for pair in zip(ours, whole, strict=False) if pair[0] != pair[1]), (len(ours), len(whole))
            )
            raise Broken(f"metrics.jsonl differs: {wrong[0]} instead of {wrong[1]}")
        params = {n: self.state(n) for n in (name, "whole")}
        if params[name] != params["whole"]:
            raise Broken("the parameters or the optimizer's state differ")

    def state(self, name: str) -> dict[str, bytes]:
        """Returns the bytes of every array in the last checkpoint."""
        from jaxlm.checkpoint.reading import Checkpoints

        checkpoints = Checkpoints(self.folder / name)
        arrays = checkpoints.restore_arrays(self.config.steps)
        checkpoints.close()
        return {key: x.tobytes() for key, x in arrays.items()}
