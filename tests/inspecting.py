"""Runs `jaxlm inspect` on small corpora, and parses its output."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from jaxlm.commands import inspect as inspect_data
from jaxlm.host.exit_codes import exit_code

ROOT = Path(__file__).parents[1]
CONFIG = ROOT / "configs/base.py"
TWO = {"t/1.txt": "abc", "t/2.txt": "defghij", "v/1.txt": "abc", "v/2.txt": "defghij"}  # 4 and 8 tokens
CHAT = [{"m": [{"role": "user", "content": "ab"}, {"role": "assistant", "content": "cd"}]}] * 2
NAMES = re.compile(r"^(update|validation batch) \d+ · row \d+ of \d+ ")


def flags(folder: Path, **keys: Any) -> list[str]:
    keys = {"data__source": "text", "data__path": folder / "t", "data__tokenizer": "bytes", "batch_size": 2} | keys
    if "data__mixture" not in keys and keys["data__source"] != "tokens":
        keys |= {"data__val_path": folder / "v"}
    keys |= {"data__cache_dir": folder / "cache"}
    return [f"--config.{k.replace('__', '.')}={v}" for k, v in keys.items()]


class Seen:
    """The output of `jaxlm inspect`: the headers and lines of its rows, all of the text, and the JSON numbers."""

    def __init__(self, out: str):
        self.out, self.numbers = out, json.loads(out.splitlines()[-1])
        self.headers, self.rows = [], []
        for line in out.splitlines():
            if NAMES.match(line):
                self.headers.append(line)
                self.rows.append([])
            elif line.startswith("│ "):
                self.rows[-1].append(line.removeprefix("│ "))


def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *argv: object) -> tuple[int, str, str]:
    capsys.readouterr()
    try:
        code = exit_code(lambda: inspect_data.main(["--config", str(CONFIG), *map(str, argv)]))
    except SystemExit as stop:  # the parser exits
        code = int(stop.code or 0)
    captured = capsys.readouterr()
    return code, captured.out, captured.err
