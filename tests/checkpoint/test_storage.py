"""While storage fails, training continues and nothing unsaved counts as saved. Afterwards, everything is written."""

import errno
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from jaxlm.host import retry
from jaxlm.host.exit_codes import exit_code
from jaxlm.run import metrics
from tests.runs import CHECKPOINT, CONFIG, ROOT, assert_identical, flags, lines, numbers, run, state_of


class Outage:
    """While `on`, writing below `folder` fails because the disk is full."""

    def __init__(self) -> None:
        self.folder, self.on, self.refused = "", False, 0

    def __call__(self, event: str, args: tuple[Any, ...]) -> None:
        if not self.on or event not in ("open", "os.mkdir", "os.rename") or not isinstance(args[0], str | os.PathLike):
            return
        reads = event == "open" and not args[2] & (os.O_WRONLY | os.O_RDWR)
        if not reads and os.fsdecode(args[0]).startswith(self.folder):
            self.refused += 1
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), args[0])


OUTAGE = Outage()
sys.addaudithook(OUTAGE)  # stays until the process ends, because audit hooks cannot be removed


@pytest.fixture
def outage(tmp_path: Path) -> Iterator[Outage]:
    OUTAGE.folder, OUTAGE.refused = str(tmp_path / "run"), 0
    yield OUTAGE
    OUTAGE.on = False


def test_an_outage_leaves_no_trace(
    outage: Outage, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """Metrics and checkpoints of that time are written afterwards; the run ends like one without an outage."""
    monkeypatch.setattr(retry, "FIRST", 0.05)
    report = metrics.Log.__call__

    def watched(self: metrics.Log, m: dict[str, Any]) -> None:
        outage.on = CHECKPOINT <= m["step"] < 2 * CHECKPOINT + 20 and "loss" in m
        report(self, m)

    monkeypatch.setattr(metrics.Log, "__call__", watched)
    assert run(tmp_path / "run", steps=3 * CHECKPOINT) == 0
    said = capsys.readouterr().out
    assert outage.refused > 5
    assert "the state of step 100 is NOT saved: No space left" in said and "newest checkpoint is of step 0" in said
    assert "metrics are NOT written" in said
    # No half-written checkpoints are left.
    there = sorted(int(p.name) for p in (tmp_path / "run/checkpoints").iterdir())
    assert there[0] == 0 and there[-1] == 300 and not {100, 200} & set(there)
    assert any(200 < step < 300 for step in there)  # saved as soon as possible, not at the next period
    assert numbers(tmp_path / "run") == numbers(whole, 3 * CHECKPOINT)
    assert_identical(state_of(tmp_path / "run", 300), state_of(whole, 300))


def test_failing_to_save_the_last_state_is_an_error(
    outage: Outage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(retry, "FIRST", 0.05)
    monkeypatch.setattr(retry, "PATIENCE", 1.0)
    assert run(tmp_path / "run", steps=1) == 0

    def fails() -> int:
        outage.on = True
        return run(tmp_path / "run", steps=2)

    report = metrics.Log.__call__

    def watched(self: metrics.Log, m: dict[str, Any]) -> None:
        outage.on = True
        report(self, m)

    monkeypatch.setattr(metrics.Log, "__call__", watched)
    assert exit_code(lambda: run(tmp_path / "run", steps=2)) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "the state of step 2 cannot be saved: No space left" in error
    assert "the newest checkpoint is of step 1" in error
    outage.on = False
    monkeypatch.undo()
    assert run(tmp_path / "run", steps=2) == 0
    assert [m["step"] for m in lines(tmp_path / "run") if "loss" in m] == [1, 2]


def mounts(folder: Path, size: str) -> bool:
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    return os.geteuid() == 0 and subprocess.run(command, capture_output=True).returncode == 0


def test_a_really_full_disk(tmp_path: Path):
    """Here C++ code fails in the middle of a checkpoint. Then there is room again."""
    (tmp_path / "disk").mkdir()
    if not mounts(tmp_path / "disk", "3m"):
        pytest.skip("needs root, to mount a small file system")
    workdir, ballast = tmp_path / "disk/run", tmp_path / "disk/ballast"
    try:
        command = [sys.executable, "-m", "jaxlm.main", "--config", str(CONFIG), "--workdir", str(workdir)]
        keys = {"steps": 600, "checkpoint.every_steps": 50, "checkpoint.keep": 1, "eval.every_steps": 0}
        process = subprocess.Popen(
            [*command, *flags(**keys)], cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        assert process.stdout
        for line in process.stdout:
            if " · loss " in line:
                break
        with ballast.open("wb", buffering=0) as file:
            while (free := os.statvfs(ballast).f_bavail * os.statvfs(ballast).f_frsize) > 20_000:
                file.write(bytes(min(free - 20_000, 1 << 16)))
        for line in process.stdout:
            if "NOT saved" in line:
                break
        else:
            raise AssertionError(process.communicate())
        ballast.unlink()
        out, error = process.communicate(timeout=120)
        assert process.returncode == 0, (out, error)
        assert [p.name for p in (workdir / "checkpoints").iterdir()] == ["600"]  # and no half-written one
    finally:
        time.sleep(0.1)
        subprocess.run(["umount", "-l", str(tmp_path / "disk")], check=True)
