"""`--help` describes every key, and the message for a wrong name suggests the right one."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from jaxlm import main
from jaxlm.config import UserError, files, flatten, hints, key_types, keys
from tests.configurations import BASE, ROOT, refusal


def test_every_key_has_a_description():
    found = keys.meanings()
    assert found.keys() == key_types().keys()
    assert [key for key, meaning in found.items() if not meaning] == []
    assert found["model.d_model"] == "width of the residual stream"
    assert found["model.matmul_precision"].startswith("Precision of float32 matrix")  # it stands above the key


@pytest.mark.parametrize("width", [60, 118])
def test_help_lists_every_key(width: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setenv("COLUMNS", str(width + 2))
    with pytest.raises(SystemExit) as left:
        main.run(["--help"])
    shown = capsys.readouterr().out
    assert left.value.code == 0 and shown.startswith("usage: jaxlm")
    assert max(map(len, shown.splitlines())) <= width
    for key, value in flatten(files.load(BASE)).items():
        (line,) = re.findall(rf"^  {re.escape(key)}=(.*)$", shown, flags=re.M)
        if not isinstance(value, (bool, str)):
            assert line.split()[0] == str(value)
    assert "  data.chat_template=$'<|{role}|>\\n{content}\\n'\n" in shown
    assert re.search(r"model\.activation=relu2\s.*\(gelu,\s+relu,\s+swiglu,\s+geglu,\s+relu2\)", shown, flags=re.S)


def test_help_ends_quietly_if_its_pipe_is_closed(tmp_path: Path):
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "jaxlm.main", "--help"]
    done = subprocess.run(command, cwd=ROOT, stdout=write, stderr=subprocess.PIPE, text=True, timeout=60, check=False)
    os.close(write)
    assert (done.returncode, done.stderr) == (0, "")


def test_each_name_from_elsewhere_suggests_a_key_or_an_option():
    for meant in hints.NAMES_ELSEWHERE:
        first = re.match(r"--\w+|[\w.]+", meant)
        assert first and (first[0] in key_types() or first[0] == "the" or f"{first[0]} " in main.parser().format_help())
    assert not hints.ELSEWHERE.keys() & {key.rsplit(".", 1)[-1] for key in key_types()}
    assert len(hints.ELSEWHERE) == sum(len(names.split()) for names in hints.NAMES_ELSEWHERE.values())


@pytest.mark.parametrize(
    "argument, said",
    [
        ("--learning_rate=1", "--learning_rate: unknown option; did you mean --config.optim.lr?"),
        ("--lr=1", "--lr: unknown option; did you mean --config.optim.lr?"),
        ("--weight-decay=1", "--weight-decay: unknown option; did you mean --config.optim.weight_decay?"),
        ("--out_dir=x", "--out_dir: unknown option; use --workdir"),
        ("--zzzz=1", "--zzzz: unknown option; see --help"),
        ("--config.learning_rate=1", "command line: unknown key 'learning_rate'; did you mean 'optim.lr'?"),
        ("--config.train.max_iters=1", "command line: unknown key 'train.max_iters'; did you mean 'steps'?"),
        ("--config.dropout=1", "command line: unknown key 'dropout'; did you mean 'model.dropout'?"),
        ("--config.eva.every_steps=1", "command line: unknown key 'eva.every_steps'; did you mean 'eval.every_steps'?"),
        ("--config.betas=1", "command line: unknown key 'betas'; use optim.b1 and optim.b2"),
        (
            "--config.num_epochs=1",
            "command line: unknown key 'num_epochs'; use steps, counted in optimizer steps of"
            " batch_size * seq_len tokens",
        ),
    ],
)
def test_the_message_for_a_wrong_name_suggests_the_right_one(argument: str, said: str):
    assert refusal(argument) == said


def test_a_name_from_elsewhere_in_a_file_gets_the_same_suggestion(tmp_path: Path):
    path = tmp_path / "mine.py"
    path.write_text("from configs import base\ndef get_config():\n    c = base.get_config()\n    c.optim.betas = 5\n")
    with pytest.raises(UserError, match=r"unknown key 'optim\.betas'; use optim\.b1 and optim\.b2"):
        files.load(path)
