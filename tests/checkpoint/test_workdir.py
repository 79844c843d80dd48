"""A workdir belongs to one run at a time, and a run overwrites only its own files."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from jaxlm.checkpoint.workdirs import FILES, FOLDERS, Lock
from jaxlm.config import UserError
from jaxlm.data import load_tokenizer
from jaxlm.host.exit_codes import exit_code
from jaxlm.run.open_run import open_run, score
from tests.runs import CHECKPOINT, lines, run, start, wait_for_step


def contents(folder: Path) -> dict[Path, bytes]:
    return {p: p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def refusal(workdir: Path, **keys: Any) -> str:
    """Returns the line that refuses a run in a workdir, and checks that its files stay as they are."""
    before = contents(workdir)
    with pytest.raises(UserError) as caught:
        run(workdir, **keys)
    assert contents(workdir) == before
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("name", [*FILES, *FOLDERS])
def test_files_of_others_are_not_overwritten(name: str, tmp_path: Path):
    if name in FOLDERS:
        (tmp_path / name).mkdir()
        (tmp_path / name / "mine").write_text("my own")
    else:
        (tmp_path / name).write_text("my own")
    message = refusal(tmp_path, steps=1)
    assert name in message and str(tmp_path) in message


def test_other_files_are_left_alone(tmp_path: Path):
    names = ["notes.md", "config.tmp", "metrics.tmp", "tokenizer.tmp/mine"]
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("my own")
    assert run(tmp_path, steps=1, checkpoint__every_steps=0, eval__every_steps=0) == 0
    assert all((tmp_path / name).read_text() == "my own" for name in names)
    assert not list(tmp_path.glob(".config.json.*"))  # the run's own temporary files


def test_one_run_at_a_time(tmp_path: Path):
    """When the first run is killed, the second resumes it."""
    workdir = tmp_path / "run"
    first = start(workdir)
    try:
        wait_for_step(first, workdir, 10)
        with pytest.raises(UserError, match=r"another run is at work in it; allowed: one at a time"):
            run(workdir)
        assert first.poll() is None
    finally:
        first.kill()
        first.communicate()
    assert run(workdir, steps=max(m["step"] for m in lines(workdir)) + 1 + CHECKPOINT) == 0


def test_the_lock_is_freed(tmp_path: Path):
    with Lock() as lock:
        lock.take(tmp_path)
        with pytest.raises(UserError, match="another run"):
            Lock().take(tmp_path)
    with Lock() as lock:
        lock.take(tmp_path)


TEXT = {"data.source": "text", "steps": 1, "eval.batches": 1, "eval.sample_tokens": 0, "data.vocab_size": 300}


@pytest.fixture
def text(tmp_path: Path) -> dict[str, Any]:
    """The keys of a run on a text."""
    (tmp_path / "text").write_text("the quick brown fox jumps over the lazy dog\n" * 40)
    return TEXT | {"data.path": tmp_path / "text", "data.cache_dir": tmp_path / "cache"}


def test_the_tokenizer_of_a_run_killed_before_its_first_save_is_replaced(text: dict[str, Any], tmp_path: Path):
    assert run(tmp_path / "run", **text, **{"data.tokenizer": "bytes"}) == 0
    shutil.rmtree(tmp_path / "run/checkpoints")  # as if killed before it saved
    assert run(tmp_path / "run", **text, **{"data.tokenizer": "chars"}) == 0
    characters = set(Path(text["data.path"]).read_text())
    assert load_tokenizer(tmp_path / "run/tokenizer").vocab_size == len(characters) + 1  # and bos


@pytest.mark.parametrize("content", ['{"kind": "chars", "alphabet": ["a"]}', "[1,"])
def test_another_tokenizer_in_a_workdir_is_noticed(content: str, text: dict[str, Any], tmp_path: Path):
    assert run(tmp_path / "run", **text, **{"data.tokenizer": "bytes"}) == 0
    (tmp_path / "run/tokenizer/jaxlm_tokenizer.json").write_text(content)
    assert "tokenizer" in refusal(tmp_path / "run", **text | {"data.tokenizer": "bytes", "steps": 2})


def test_data_of_another_vocabulary_is_not_scored(text: dict[str, Any], tmp_path: Path):
    assert run(tmp_path / "run", **text, **{"data.tokenizer": "bytes"}) == 0
    opened = open_run(tmp_path / "run", None)
    for vocab_size in (5000, 257):  # the second is as large as the run's, but its ids are different
        config = open_run(tmp_path / "run", None).config
        config.data.source, config.data.vocab_size = "synthetic", vocab_size
        with pytest.raises(UserError, match=r"data\.source is 'synthetic': .* token ids are not those of the run"):
            score(opened, config)


@pytest.mark.parametrize("name", ["checkpoints", "tensorboard", "tokenizer", "metrics.jsonl", "config.json"])
def test_files_in_the_way_are_refused_before_training(name: str, copy: Path):
    if (copy / name).is_dir():
        shutil.rmtree(copy / name)
    (copy / name).unlink(missing_ok=True)
    if name in FILES:
        (copy / name).mkdir()
    else:
        (copy / name).write_text("my own")
    assert name in refusal(copy)


@pytest.mark.parametrize("line", ["my own notes", '{"step": "a"}', "\udcff", "[]"])
def test_invalid_metrics_are_refused(line: str, copy: Path):
    with open(copy / "metrics.jsonl", "ab") as file:
        file.write(os.fsencode(line) + b"\n")
    assert "metrics.jsonl" in refusal(copy)


def test_half_a_line_of_a_killed_run_is_dropped(copy: Path):
    before = lines(copy)
    with open(copy / "metrics.jsonl", "a") as file:
        file.write('{"step": 1')
    assert run(copy, steps=CHECKPOINT + 1) == 0
    assert lines(copy)[: len(before)] == before and lines(copy)[-1]["step"] == CHECKPOINT + 1


def edit(workdir: Path, change: Any) -> None:
    content = json.loads((workdir / "config.json").read_text())
    change(content)
    (workdir / "config.json").write_text(json.dumps(content))


@pytest.mark.parametrize(
    "key, value",
    [
        ("history", None),
        ("vocab_size", "64"),
        ("vocab_size", 5),
        ("vocab_size", 10**12),
        ("data_fingerprint", 1),
        ("config", []),
    ],
)
def test_a_damaged_config_json_is_refused(key: str, value: Any, copy: Path):
    edit(copy, lambda content: content.update({key: value}))
    message = refusal(copy)
    assert ("config.json" in message and key in message) or "data has changed" in message
    with pytest.raises(UserError, match=r"config\.json"):
        open_run(copy, None)


def test_a_config_json_that_is_not_json_is_refused(copy: Path):
    for content in ("[" * 100_000, "{", "[]", '"x"'):
        (copy / "config.json").write_text(content)
        assert "config.json" in refusal(copy)


def test_keys_that_the_saved_configuration_lacks(copy: Path, capsys: pytest.CaptureFixture[str]):
    edit(copy, lambda content: content["config"]["optim"].pop("embed_lr"))
    edit(copy, lambda content: content["config"].pop("deterministic"))
    assert run(copy, steps=CHECKPOINT + 1, optim__embed_lr=0.1) == 0
    shown = capsys.readouterr().out
    assert "optim.embed_lr is new: 0.1" in shown and "deterministic is new: False" in shown
    assert json.loads((copy / "config.json").read_text())["config"]["optim"]["embed_lr"] == 0.1
    edit(copy, lambda content: content["config"]["model"].pop("key_offset"))
    assert "model.key_offset was False" in refusal(copy)  # the behavior before the key existed, not base.py's
    edit(copy, lambda content: content["config"]["optim"].update(unheard_of=1))
    assert "optim.unheard_of" in refusal(copy)
    edit(copy, lambda content: content["config"].update(steps=-5) or content["config"]["optim"].pop("unheard_of"))
    assert "config.json: steps is -5" in refusal(copy)


def test_an_empty_checkpoint_is_named_and_put_aside(copy: Path, capsys: pytest.CaptureFixture[str]):
    (copy / "checkpoints/99999").mkdir()
    assert run(copy, steps=CHECKPOINT) == 0
    assert "checkpoints/99999: no params in it: put aside as 99999.damaged" in capsys.readouterr().out
    for step in (0, CHECKPOINT):
        shutil.rmtree(copy / f"checkpoints/{step}")
    (copy / "checkpoints/7").mkdir()
    assert exit_code(lambda: run(copy, steps=CHECKPOINT)) == 4
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "checkpoints/7: no params in it; none of its 1 checkpoints" in error


@pytest.mark.parametrize("name", ["²", "007", "9" * 30])
def test_a_folder_that_is_no_step_is_left_alone(name: str, copy: Path):
    (copy / "checkpoints" / name).mkdir()
    assert run(copy, steps=CHECKPOINT) == 0 and open_run(copy, None).step == CHECKPOINT
    assert (copy / "checkpoints" / name).is_dir()


def test_a_file_in_place_of_a_checkpoint_is_refused(copy: Path):
    shutil.rmtree(copy / "checkpoints")
    (copy / "checkpoints").mkdir()
    (copy / "checkpoints/1500").write_text("")
    assert "checkpoints/1500" in refusal(copy)


@pytest.mark.parametrize("steps, count, traced", [(7, 3, 3), (2, 2, 2), (40, 100, None)])
def test_a_profile_is_always_written(steps: int, count: int, traced: int | None, tmp_path: Path):
    keys = {"steps": steps, "log.profile_steps": count, "eval.every_steps": 0, "checkpoint.every_steps": 0}
    if traced is None:
        assert "log.profile_steps" in refusal(tmp_path, **keys)
        return
    assert run(tmp_path, **keys) == 0
    assert len(list((tmp_path / "profile").rglob("*.xplane.pb"))) == 1


def test_tools_read_a_run_while_it_trains(tmp_path: Path):
    workdir = tmp_path / "run"
    process = start(workdir)
    try:
        wait_for_step(process, workdir, CHECKPOINT + 10)
        assert open_run(workdir, 0).step == 0
        assert process.poll() is None
    finally:
        process.kill()
        process.communicate()


def test_ctrl_c_while_a_command_starts(tmp_path: Path):
    """Prints one line without a traceback, and its exit code tells the shell of the signal."""
    code = "import sys; from jaxlm import main\ndef stop():\n raise KeyboardInterrupt\nsys.exit(main.exit_code(stop))"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (ended.returncode, ended.stdout, ended.stderr.count("\n")) == (130, "", 1)
    assert ended.stderr.startswith("jaxlm: stopped; run the same command again")
