"""tools/chaos.py on a small run: all promises hold, and a broken one is noticed."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from jaxlm.config import UserError
from jaxlm.config.files import load
from tests.runs import ROOT
from tools import chaos

STEPS = 60
FAULTS = "kill,disk"  # test_resume.py, test_checksums.py, test_processes.py and test_watchdog.py test the others
KEYS = {
    "steps": STEPS,
    "batch_size": 8,
    "seq_len": 16,
    "model.d_model": 16,
    "model.scan_unroll": 1,
    "optim.ema_decay": 0.9,
    "data.source": "text",
    "data.tokenizer": "sentencepiece",
    "data.vocab_size": 300,
    "data.val_fraction": 0.1,
    "parallel.devices": 2,
    "checkpoint.every_steps": 6,
    "eval.every_steps": 12,
    "log.every_steps": 2,
    "optim.warmup_steps": 1,
    "optim.schedule": "constant",
    "log.tensorboard": False,
}


def command(tmp_path: Path, *more: str) -> list[str]:
    text = tmp_path / "text.txt"
    text.write_text("".join(f"line {i}: {i * i} is the square of {i}\n" for i in range(3000)))
    flags = [f"--config.{k}={str(v).lower() if isinstance(v, bool) else v}" for k, v in KEYS.items()]
    return [
        "--config",
        str(ROOT / "configs/debug.py"),
        "--workdir",
        str(tmp_path / "chaos"),
        f"--config.data.path={text}",
        *flags,
        *more,
    ]


@pytest.mark.ci
def test_every_promise_holds(tmp_path: Path):
    arguments = command(tmp_path, "--kills", "2", "--outage", "2", "--faults", FAULTS)
    result = subprocess.run(
        [sys.executable, str(ROOT / "tools/chaos.py"), *arguments],
        capture_output=True,
        text=True,
        timeout=600,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert result.returncode == 0, (result.stdout, result.stderr)
    assert json.loads(result.stdout.splitlines()[-1]) == {"held": dict.fromkeys(FAULTS.split(","), True)}
    kinds = [line.split(" · ")[0] for line in result.stdout.splitlines()[:-1]]
    assert kinds == ["undisturbed", *FAULTS.split(",")]


def test_different_metrics_or_parameters_are_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    bench = chaos.Bench(load(ROOT / "configs/debug.py"), [], tmp_path, random.Random(0))
    for name, loss in (("whole", 1.0), ("kill", 1.0), ("term", 1.0000001)):
        (tmp_path / name).mkdir()
        line = json.dumps({"step": 1, "loss": loss, "step_seconds": loss * 7})
        (tmp_path / name / "metrics.jsonl").write_text(line + "\n")
    states = {"whole": {"params/w": b"1"}, "kill": {"params/w": b"1"}, "term": {"params/w": b"1"}}
    monkeypatch.setattr(chaos.Bench, "state", lambda self, name: states[name])
    bench.same("kill")
    with pytest.raises(chaos.Broken, match=r"metrics\.jsonl differs"):
        bench.same("term")
    states["kill"] = {"params/w": b"2"}
    with pytest.raises(chaos.Broken, match="parameters"):
        bench.same("kill")


@pytest.mark.parametrize("counts", [{"save": 40, "metrics": 30}, {"store": 5, "save": 40, "delete": 30, "metrics": 30}])
def test_kills_happen_only_at_what_the_run_does(counts: dict[str, int], tmp_path: Path):
    """A run on synthetic tokens builds no store, and a run that keeps all checkpoints deletes none."""
    bench = chaos.Bench(load(ROOT / "configs/debug.py"), [], tmp_path, random.Random(0), counts, startup=1.0)
    first = [chaos._moment(bench) for _ in range(10)]
    assert all(m.get("kind") == "store" for m in first) == ("store" in counts)
    (tmp_path / "kill.log").write_text('{"killed": "store"}\n' * 2)
    moments = first + [chaos._moment(bench) for _ in range(500)]
    assert {m["kind"] for m in moments if m["kill"] == "file"} == set(counts)
    assert all(1 <= m["count"] <= counts[m["kind"]] for m in moments if m["kill"] == "file")
    assert {m["kill"] for m in moments} == {"file", "place", "step", "time"}


@pytest.mark.parametrize(
    "argv, words",
    [
        (["--faults", "kill,flood"], ["--faults", "'flood'", "hang"]),
        (["--kills", "0"], ["--kills is 0"]),
        (["--outage", "nan"], ["--outage is nan"]),
        (["--config.seq_len=x"], ["seq_len", "'x'"]),
    ],
)
def test_wrong_arguments_are_refused(
    argv: list[str], words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(sys, "argv", ["chaos.py", *command(tmp_path), *argv])
    with pytest.raises(UserError) as refusal:
        chaos.main()
    assert all(word in str(refusal.value) for word in words)
    assert not (tmp_path / "chaos").exists()


def test_a_folder_with_files_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "argv", ["chaos.py", *command(tmp_path)])
    (tmp_path / "chaos").mkdir()
    (tmp_path / "chaos/mine").touch()
    with pytest.raises(UserError, match="not empty; allowed: a new folder"):
        chaos.main()
