"""What is decided before JAX starts."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from jaxlm import runtime
from jaxlm.cli import load

CONFIG = Path(__file__).parents[1] / "configs/debug.py"
ALL = ["deterministic=true", "parallel.overlap=true", "parallel.bucket_mb=25"]


def flags(monkeypatch: pytest.MonkeyPatch, own: str, *overrides: str) -> list[str]:
    monkeypatch.setenv("XLA_FLAGS", own)
    return runtime.gpu_flags(load(CONFIG, [f"--config.{o}" for o in overrides]), 1)


def test_gpu_flags_are_those_that_the_run_needs(monkeypatch: pytest.MonkeyPatch):
    assert flags(monkeypatch, "", "parallel.devices=1") == []
    plain = flags(monkeypatch, "")
    assert "--xla_gpu_enable_latency_hiding_scheduler=true" in plain and not any("pipelined" in f for f in plain)
    everything = flags(monkeypatch, "", *ALL)
    assert f"--xla_gpu_all_reduce_combine_threshold_bytes={25 * 2**20}" in everything
    assert {"--xla_gpu_enable_pipelined_all_reduce=true", "--xla_gpu_deterministic_ops=true"} <= set(everything)


def test_the_environment_overrides_them(monkeypatch: pytest.MonkeyPatch):
    own = "--xla_gpu_enable_latency_hiding_scheduler=false --xla_gpu_all_gather_combine_threshold_bytes=1"
    left = flags(monkeypatch, own, *ALL)
    assert left and not any("latency" in f or "all_gather_combine" in f for f in left)


@pytest.mark.slow
def test_xla_knows_every_flag(monkeypatch: pytest.MonkeyPatch):
    """It ends a process that has one which it does not know."""
    known = " ".join(flags(monkeypatch, "", *ALL))
    for extra, code in (("", 0), (" --xla_gpu_no_such_flag=true", 1)):
        result = subprocess.run(
            [sys.executable, "-c", "import jax; jax.devices()"],
            capture_output=True, env=os.environ | {"XLA_FLAGS": known + extra, "JAX_PLATFORMS": "cpu"},
        )  # fmt: skip
        assert result.returncode == code, result.stderr
