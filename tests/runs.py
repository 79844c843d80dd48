"""Runs a tiny model, in this process or in a new one, and reads the files that it leaves."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxlm.checkpoint.reading import Checkpoints
from jaxlm.config.files import load
from jaxlm.model import make_model
from jaxlm.run import training
from jaxlm.train import step as train_step
from jaxlm.train.placement import Placement

ROOT = Path(__file__).parents[1]
CONFIG = ROOT / "configs/debug.py"
STEPS, CHECKPOINT = 600, 100
TIMES = {"time", "tokens_per_second", "step_seconds", "mfu", "peak_memory_bytes"}
TINY = {
    "steps": STEPS,
    "batch_size": 8,
    "seq_len": 16,
    "model.d_model": 16,
    "model.scan_unroll": 1,
    "model.dropout": 0.1,
    "model.matmul_precision": "highest",  # a run in another process must be the same bit for bit
    "optim.name": "adamw",
    "optim.lr": 0.003,
    "optim.schedule": "constant",
    "optim.warmup_steps": 1,
    "optim.ema_decay": 0.9,
    "parallel.devices": 2,
    "checkpoint.every_steps": CHECKPOINT,
    "checkpoint.keep": 20,
    "eval.every_steps": 150,
    "log.tensorboard": False,
}


def xla_flags(devices: int) -> str:
    """Returns XLA_FLAGS with another number of devices."""
    return re.sub(r"(?<=device_count=)\d+", str(devices), os.environ["XLA_FLAGS"])


def flags(**keys: Any) -> list[str]:
    keys = {k.replace("__", "."): v for k, v in keys.items()}
    return [f"--config.{k}={str(v).lower() if isinstance(v, bool) else v}" for k, v in (TINY | keys).items()]


def text_keys(folder: Path) -> dict[str, Any]:
    """Writes a short text into a folder. Returns keys with which a run trains on its bytes for two steps."""
    (folder / "text.txt").write_text("the quick brown fox jumps over the lazy dog — ünïcode\n" * 40)
    return {
        "data.source": "text",
        "data.path": folder / "text.txt",
        "data.tokenizer": "bytes",
        "data.val_fraction": 0.1,
        "steps": 2,
        "data.cache_dir": folder / "cache",
        "eval.sample_tokens": 5,
    }


def run(workdir: Path, **keys: Any) -> int:
    return training.run(load(CONFIG, flags(**keys)), workdir)


def start(workdir: Path, **keys: Any) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "jaxlm.main", "--config", str(CONFIG), "--workdir", str(workdir), *flags(**keys)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def lines(workdir: Path) -> list[dict[str, Any]]:
    path = workdir / "metrics.jsonl"
    whole = path.read_text().split("\n")[:-1] if path.exists() else []
    return [json.loads(line) for line in whole]


def numbers(workdir: Path, upto: int = STEPS) -> list[dict[str, Any]]:
    """Returns the metrics without times."""
    return [{k: v for k, v in m.items() if k not in TIMES} for m in lines(workdir) if m["step"] <= upto]


def wait_for_step(process: subprocess.Popen[str], workdir: Path, step: int) -> None:
    deadline = time.monotonic() + 120
    while not any(m["step"] >= step for m in lines(workdir)):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.002)


def state_of(workdir: Path, step: int, **keys: Any) -> train_step.TrainState:
    """Returns the whole state in a checkpoint."""
    config = load(CONFIG, flags(**keys))
    model = make_model(config.model, 64, config.seq_len)
    placement = Placement(config, model, jax.devices()[: config.parallel.devices])
    fresh = placement.initial()
    checkpoints = Checkpoints(workdir)
    state = checkpoints.restore(step, placement, fresh)
    checkpoints.close()
    return jax.device_get(state)


def assert_identical(a: Any, b: Any) -> None:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)
