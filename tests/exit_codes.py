"""Runs command lines in this process: their exit codes, their errors, and the files that they leave."""

import importlib
import runpy
import sys
from pathlib import Path

import pytest

from jaxlm import main
from jaxlm.host.exit_codes import exit_code
from tests.runs import ROOT

COMMANDS = ROOT / "jaxlm/commands"
TINY = [
    "steps=2",
    "batch_size=8",
    "seq_len=16",
    "model.d_model=16",
    "model.scan_unroll=1",
    "optim.name=adamw",
    "optim.warmup_steps=0",
    "parallel.devices=2",
    "log.tensorboard=False",
    "eval.batches=1",
]


def flags(*overrides: str) -> list[str]:
    return [f"--config.{o}" for o in (*TINY, *overrides)]


def in_process(argv: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """Returns the exit code and stderr of `python -m jaxlm.main`."""
    try:
        code = exit_code(lambda: main.run(argv))
    except SystemExit as stop:  # the parser exits
        code = int(stop.code or 0)
    return code, capsys.readouterr().err


def contents(folder: Path) -> dict[Path, bytes]:
    return {p: p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def tool(name: str, *argv: object) -> int:
    """Returns the exit code of `jaxlm NAME`, or of tools/NAME.py if there is no such command."""
    try:
        if (COMMANDS / f"{name}.py").exists():
            command = importlib.import_module(f"jaxlm.commands.{name}")
            return exit_code(lambda: command.main([*map(str, argv)]))
        return _script(name, [*map(str, argv)])
    except SystemExit as stop:  # the parser exits
        return int(stop.code or 0)


def _script(name: str, argv: list[str]) -> int:
    before = sys.argv
    sys.argv = [name, *argv]
    try:
        return exit_code(runpy.run_path(str(ROOT / f"tools/{name}.py"))["main"])
    finally:
        sys.argv = before
