"""Damage to any file of a checkpoint is found, and a run resumes from the newest undamaged checkpoint."""

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
    """Returns the files of a checkpoint that have a hash, and the files of the hashes."""
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


def test_a_missing_item_is_found(short: Path, tmp_path: Path):
    for item in ("params", "ema", "train"):
        step = Path(shutil.copytree(short / "checkpoints" / str(CHECKPOINT), tmp_path / item))
        shutil.rmtree(step / item)
        reason = checksums.damage(step)
        assert reason is not None and item in reason


def test_files_without_a_hash_do_not_affect_the_state(short: Path, copy: Path):
    """Orbax adds some files without a hash. If they are damaged or gone, the restored state is the same."""
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
def test_a_run_resumes_from_the_newest_undamaged_checkpoint(
    newer: list[int], whole: Path, short: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """The numbers are those of a run without damage. The damaged checkpoint is put aside; other files stay."""
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


def test_no_undamaged_checkpoint_is_exit_code_4_and_writes_nothing(copy: Path, capsys: pytest.CaptureFixture[str]):
    for step in (0, CHECKPOINT):
        (copy / f"checkpoints/{step}/params/{checksums.NAME}").write_text("{")
    before = sorted(copy.rglob("*"))
    assert exit_code(lambda: run(copy, steps=CHECKPOINT + 1)) == 4
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and f"checkpoints/{CHECKPOINT}" in error and "none of its 2 checkpoints" in error
    assert sorted(copy.rglob("*")) == before


def test_tools_also_read_the_newest_undamaged_checkpoint(copy: Path, capsys: pytest.CaptureFixture[str]):
    assert open_run(copy, None).step == CHECKPOINT
    cut(max((copy / f"checkpoints/{CHECKPOINT}/ema").rglob("*"), key=lambda p: p.stat().st_size * p.is_file()))
    capsys.readouterr()
    assert open_run(copy, None).step == 0
    error = capsys.readouterr().err
    assert f"checkpoints/{CHECKPOINT}/ema" in error and "an older checkpoint is taken" in error
    with pytest.raises(CheckpointError, match="ema"):
        open_run(copy, CHECKPOINT)


def remove_hashes(step: Path) -> None:
    """Turns a checkpoint into one of an older version, without hashes and without the promise of any."""
    about = json.loads((step / checksums.ABOUT).read_text())
    assert about["custom_metadata"] == checksums.PROMISE
    (step / checksums.ABOUT).write_text(json.dumps(about | {"custom_metadata": {}}))
    for path in step.rglob(checksums.NAME):
        path.unlink()


def test_checkpoints_of_older_versions_without_hashes_are_accepted(short: Path, copy: Path):
    for step in (0, CHECKPOINT):
        remove_hashes(copy / f"checkpoints/{step}")
    assert run(copy, steps=CHECKPOINT + 1) == 0
    assert lines(copy)[-1]["step"] == CHECKPOINT + 1
    shutil.rmtree(copy / f"checkpoints/{CHECKPOINT}/params")
    reason = checksums.damage(copy / f"checkpoints/{CHECKPOINT}")
    assert reason is not None and "no params in it" in reason


def test_a_checkpoint_that_has_lost_all_hashes_is_damaged(copy: Path):
    """Also if Orbax's file, which promises them, is damaged or gone."""
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


def test_a_manifest_cannot_name_files_outside_of_its_folder(tmp_path: Path):
    """Otherwise a manifest could reveal other files."""
    (tmp_path / "step/params").mkdir(parents=True)
    (tmp_path / "secret").write_text("x")
    content = {"items": ["params"], "files": {"../../secret": [1, "0" * 64]}}
    (tmp_path / f"step/params/{checksums.NAME}").write_text(json.dumps(content))
    reason = checksums.damage(tmp_path / "step")
    assert reason is not None and checksums.NAME in reason
