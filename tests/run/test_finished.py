"""The command of a finished run prints its results from the files that it wrote."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from jaxlm import main
from jaxlm.config.files import load
from jaxlm.run import finished
from tests.runs import CONFIG, ROOT, flags, lines, text_keys


def closing(shown: str) -> str:
    """Returns the output after the last evaluation began, without times of day."""
    return re.sub(r"^[\d-]{10} [\d:]{8} ", "", shown, flags=re.M).rpartition("step ")[2]


@pytest.fixture
def keys(tmp_path: Path) -> list[str]:
    return flags(**text_keys(tmp_path) | {"eval.sample_prompt": "the "})


@pytest.fixture
def text(tmp_path: Path, keys: list[str]) -> Path:
    return tmp_path / "text.txt"


def test_a_finished_run_answers_at_once(
    keys: list[str], text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    workdir = tmp_path / "run"
    argv = ["--config", str(CONFIG), "--workdir", str(workdir), *keys]
    assert main.run(argv) == 0
    first = closing(capsys.readouterr().out)
    assert "this model" in first and "│ the " in first and f"report: {workdir}/report.html\nnext: " in first
    assert "2 of 2 steps" in (workdir / "report.html").read_text()
    assert lines(workdir)[-1]["sample"].startswith("the ")

    before = {p: p.read_bytes() for p in workdir.rglob("*") if p.is_file()}
    code = "import sys; from jaxlm import main; print(main.run(sys.argv[1:]), 'jax' in sys.modules)"
    again = subprocess.run([sys.executable, "-c", code, *argv], cwd=ROOT, capture_output=True, text=True, timeout=60)
    *shown, last = again.stdout.splitlines(keepends=True)
    assert again.stderr == "" and last == "0 False\n"
    assert "finished: nothing left to train" in shown[0] and closing("".join(shown)).split() == first.split()
    assert {p: p.read_bytes() for p in workdir.rglob("*") if p.is_file()} == before

    def answers(*more: str, workdir: Path = workdir, limited: bool = False) -> bool:
        return finished.answer(load(CONFIG, [*keys, *more]), workdir, limited)

    assert answers() and answers("--config.steps=9", limited=True)  # --max_minutes has given it fewer steps
    assert not answers("--config.steps=9") and not answers("--config.eval.batches=1")
    assert not answers(workdir=tmp_path / "none")

    copy = shutil.copytree(workdir, tmp_path / "copy")
    *others, score = (copy / "metrics.jsonl").read_text().splitlines(keepends=True)
    assert json.loads(score)["eval_loss"]
    (copy / "metrics.jsonl").write_text("".join(others))
    assert not answers(workdir=copy)  # as if stopped in its last evaluation
    (copy / "metrics.jsonl").write_text("".join([*others, score]))
    assert answers(workdir=copy)
    next(p for p in (copy / "checkpoints/2/params").rglob("*") if p.is_file()).write_text("damaged")
    assert not answers(workdir=copy)

    text.write_text(text.read_text() + "one more line\n")
    assert not answers()


def test_the_command_of_a_hint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Names the command if PATH finds it, else its shortest path; without an installation, Python with -m jaxlm."""
    folder = tmp_path / "an env/bin"
    folder.mkdir(parents=True)
    for name in ("python", "jaxlm"):
        (folder / name).write_text("")
        (folder / name).chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(folder / "python"))
    monkeypatch.chdir(tmp_path)
    assert finished.command("generate") == "'an env/bin/jaxlm' generate"
    monkeypatch.setenv("PATH", str(folder))
    assert finished.command("generate") == "jaxlm generate"
    (folder / "jaxlm").unlink()
    assert finished.command("generate") == "python -m jaxlm generate"
