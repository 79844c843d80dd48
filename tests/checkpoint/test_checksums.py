"""Damage to any file of a checkpoint is found, and the newest whole one is taken."""

import json
import shutil
from pathlib import Path

import pytest

from jaxlm.checkpoint import checksums
from jaxlm.checkpoint.reading import CheckpointError
from jaxlm.host.exit_codes import exit_code
from jaxlm.run.open_run import open_run
from tests.runs import CHECKPOINT, STEPS, assert_identical, lines, numbers, run, state_of


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def zero(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 16
    path.write_bytes(content)


DAMAGE = {"cut": cut, "zero": zero, "flip": flip, "remove": Path.unlink}


def hashed(step: Path) -> list[Path]:
    return [
        item / name
        for item in step.iterdir()
        if (item / checksums.NAME).exists()
        for name in (checksums.NAME, *json.loads((item / checksums.NAME).read_text())["files"])
    ]


@pytest.mark.parametrize("how", DAMAGE)
def test_any_damage_is_found_and_named(how: str, short: Path, tmp_path: Path):
    step = Path(shutil.copytree(short / "checkpoints" / str(CHECKPOINT), tmp_path / "step"))
    assert checksums.damage(step) is None
    files = hashed(step)
    assert {p.parts[len(step.parts)] for p in files} == {"params", "ema", "train"} and len(files) > 20
    for path in files:
        content = path.read_bytes()
        DAMAGE[how](path)
        reason = checksums.damage(step)
        if content and (how != "zero" or content.strip(b"\0")):
            assert reason is not None, path
            assert path.name in reason or path.name == checksums.NAME
        path.write_bytes(content)
    assert checksums.damage(step) is None


def test_a_whole_item_that_is_gone_is_missed(short: Path, tmp_path: Path):
    for item in ("params", "ema", "train"):
        step = Path(shutil.copytree(short / "checkpoints" / str(CHECKPOINT), tmp_path / item))
        shutil.rmtree(step / item)
        reason = checksums.damage(step)
        assert reason is not None and item in reason


def test_what_orbax_adds_by_itself_is_of_no_use_to_the_state(short: Path, copy: Path):
    """Files without a hash: damaged or gone, what is restored is the same, or the checkpoint is refused."""
    step = copy / "checkpoints" / str(CHECKPOINT)
    others = [p for p in step.rglob("*") if p.is_file() and p not in hashed(step)]
    assert others
    want = state_of(short, CHECKPOINT)
    for path in others:
        content = path.read_bytes()
        for act in (zero, Path.unlink):
            act(path)
            assert_identical(state_of(copy, CHECKPOINT), want)
            path.write_bytes(content)


@pytest.mark.parametrize("newer", [[], [STEPS]])
def test_the_newest_whole_checkpoint_is_gone_on_from(
    newer: list[int], whole: Path, short: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """To the same numbers as if nothing had been; the damaged one is put aside, and what is not ours is left alone."""
    workdir = Path(shutil.copytree(whole if newer else short, tmp_path / "run"))
    (workdir / "notes.txt").write_text("mine")
    (workdir / "checkpoints/notes").mkdir()
    newest = newer[-1] if newer else CHECKPOINT
    flip(next(p for p in (workdir / "checkpoints" / str(newest) / "train").rglob("*") if p.stat().st_size > 500))
    assert run(workdir, steps=newest) == 0
    said = [line for line in capsys.readouterr().out.splitlines() if ".damaged" in line]
    assert len(said) == 1 and f"checkpoints/{newest}/train" in said[0] and "other content" in said[0]
    assert (workdir / f"checkpoints/{newest}.damaged").is_dir()
    assert numbers(workdir) == numbers(whole, newest) or not newer
    assert_identical(state_of(workdir, newest), state_of(whole, newest))
    assert (workdir / "notes.txt").read_text() == "mine" and (workdir / "checkpoints/notes").is_dir()


def test_none_whole_is_exit_code_4_and_writes_nothing(copy: Path, capsys: pytest.CaptureFixture[str]):
    for step in (0, CHECKPOINT):
        (copy / f"checkpoints/{step}/params/{checksums.NAME}").write_text("{")
    before = sorted(copy.rglob("*"))
    assert exit_code(lambda: run(copy, steps=CHECKPOINT + 1)) == 4
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and f"checkpoints/{CHECKPOINT}" in error and "none of its 2 checkpoints" in error
    assert sorted(copy.rglob("*")) == before


def test_tools_take_the_newest_whole_one_too(copy: Path, capsys: pytest.CaptureFixture[str]):
    assert open_run(copy, None).step == CHECKPOINT
    cut(max((copy / f"checkpoints/{CHECKPOINT}/ema").rglob("*"), key=lambda p: p.stat().st_size * p.is_file()))
    capsys.readouterr()
    assert open_run(copy, None).step == 0
    error = capsys.readouterr().err
    assert f"checkpoints/{CHECKPOINT}/ema" in error and "an older checkpoint is taken" in error
    with pytest.raises(CheckpointError, match="ema"):
        open_run(copy, CHECKPOINT)


def as_before(step: Path) -> None:
    """Makes a checkpoint what older versions wrote: without hashes, and without the promise of any."""
    about = json.loads((step / checksums.ABOUT).read_text())
    assert about["custom_metadata"] == checksums.PROMISE
    (step / checksums.ABOUT).write_text(json.dumps(about | {"custom_metadata": {}}))
    for path in step.rglob(checksums.NAME):
        path.unlink()


def test_checkpoints_of_before_there_were_hashes(short: Path, copy: Path):
    for step in (0, CHECKPOINT):
        as_before(copy / f"checkpoints/{step}")
    assert run(copy, steps=CHECKPOINT + 1) == 0
    assert lines(copy)[-1]["step"] == CHECKPOINT + 1
    shutil.rmtree(copy / f"checkpoints/{CHECKPOINT}/params")
    reason = checksums.damage(copy / f"checkpoints/{CHECKPOINT}")
    assert reason is not None and "no params in it" in reason


def test_a_checkpoint_that_has_lost_all_hashes_is_damaged(copy: Path):
    """Also where Orbax's file, which promises them, is gone with them."""
    step = copy / f"checkpoints/{CHECKPOINT}"
    for path in step.rglob(checksums.NAME):
        path.unlink()
    about, content = step / checksums.ABOUT, (step / checksums.ABOUT).read_bytes()
    assert f"every {checksums.NAME} of it is gone" in (checksums.damage(step) or "")
    for act in (cut, zero, Path.unlink):
        act(about)
        assert checksums.ABOUT in (checksums.damage(step) or "")
        about.write_bytes(content)
    assert run(copy, steps=CHECKPOINT) == 0
    assert (copy / f"checkpoints/{CHECKPOINT}.damaged").is_dir()


def test_hashes_go_nowhere_else(tmp_path: Path):
    """A manifest that leads out of its folder is no way to learn of other files."""
    (tmp_path / "step/params").mkdir(parents=True)
    (tmp_path / "secret").write_text("x")
    content = {"items": ["params"], "files": {"../../secret": [1, "0" * 64]}}
    (tmp_path / f"step/params/{checksums.NAME}").write_text(json.dumps(content))
    reason = checksums.damage(tmp_path / "step")
    assert reason is not None and checksums.NAME in reason
