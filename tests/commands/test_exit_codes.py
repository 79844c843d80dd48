"""A user's mistake prints one line that names it, ends with the documented exit code, and writes nothing."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from jaxlm import main
from tests.exit_codes import contents, flags, in_process, tool
from tests.runs import CONFIG, ROOT


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """Unusable corpora and configurations, and a usable corpus."""
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "latin1.txt").write_bytes("déjà vu ".encode("latin-1") * 500)
    (tmp_path / "short.txt").write_text("too short")
    (tmp_path / "good.txt").write_text("a line of good text\n" * 200)
    np.save(tmp_path / "short.npy", np.zeros(5, np.uint16))
    np.save(tmp_path / "ids.npy", np.full(1000, 70, np.uint16))
    (tmp_path / "config.py").write_text("def get_config():\n    return 1 / 0\n")
    (tmp_path / "leaves.py").write_text("import sys\ndef get_config():\n    sys.exit(0)\n")
    (tmp_path / "huge.py").write_text(
        "from configs import base\ndef get_config():\n    c = base.get_config()\n"
        "    c.optim.lr = 10**400\n    return c\n"
    )
    return tmp_path


TEXT = ["data.source=text", "data.tokenizer=bytes", "data.cache_dir=FILES/cache"]
WRONG = {  # name: (overrides, words of the message)
    "unknown key": (["optim.learning_rate=1"], ["optim.learning_rate", "did you mean"]),
    "unknown section": (["modle.d_model=1"], ["modle.d_model", "model.d_model"]),
    "not a whole number": (["steps=many"], ["steps", "many", "whole number"]),
    "not a number": (["optim.lr=fast"], ["optim.lr", "fast", "a number"]),
    "not a bool": (["deterministic=perhaps"], ["deterministic", "perhaps", "true or false"]),
    "not one of": (["model.norm=batchnorm"], ["model.norm", "batchnorm", "rmsnorm"]),
    "negative": (["optim.lr=-1"], ["optim.lr", "-1", "more than 0"]),
    "heads": (["model.num_heads=3"], ["model.num_heads", "3", "16"]),
    "key/value heads": (["model.num_kv_heads=4"], ["model.num_kv_heads", "4", "2"]),
    "devices do not divide": (["parallel.devices=3"], ["batch_size", "8", "3 devices"]),
    "too many devices": (["parallel.devices=16", "batch_size=16"], ["parallel.devices", "16", "8"]),
    "accumulation does not divide": (["optim.accum_steps=3"], ["batch_size", "8", "optim.accum_steps = 3"]),
    "devices times accumulation": (["optim.accum_steps=8"], ["batch_size", "8", "16"]),
    "missing file": ([*TEXT, "data.path=FILES/no.txt"], ["data.path", "no.txt"]),
    "empty file": ([*TEXT, "data.path=FILES/empty.txt"], ["empty.txt"]),
    "not utf-8": ([*TEXT, "data.path=FILES/latin1.txt"], ["latin1.txt", "UTF-8"]),
    "shorter than a sequence": ([*TEXT, "data.path=FILES/short.txt", "data.val_fraction=0.3"], ["seq_len"]),
    "tokens shorter than a sequence": (["data.source=tokens", "data.path=FILES/short.npy"], ["short.npy", "seq_len"]),
    "ids outside the vocabulary": (["data.source=tokens", "data.path=FILES/ids.npy"], ["ids.npy", "70", "63"]),
    "no path": (["data.source=text"], ["data.path"]),
    "no cache": (
        ["data.source=text", "data.path=FILES/good.txt", "data.tokenizer=bytes", "data.cache_dir=FILES/good.txt/cache"],
        ["data.cache_dir", "good.txt"],
    ),
    "weights from nowhere": (["checkpoint.resume=FILES/nothing"], ["checkpoint.resume", "nothing"]),
    "cudnn": (["model.attention=cudnn", "model.dtype=bfloat16"], ["model.attention", "cudnn", "xla"]),
    "cudnn in float32": (["model.attention=cudnn"], ["model.dtype", "float32", "bfloat16"]),
    "prompt": (
        [*TEXT, "data.path=FILES/good.txt", "data.tokenizer=chars", "eval.sample_prompt=Q"],
        ["eval.sample_prompt", "'Q'", "eval.sample_tokens"],
    ),
    "warmup": (["optim.warmup_steps=3"], ["optim.warmup_steps", "3", "2"]),
    "profile of more steps than there are": (["log.profile_steps=3"], ["log.profile_steps", "3", "2"]),
    "larger than JAX's integers": (["steps=3000000000"], ["steps", "3000000000", "2147483647"]),
    "many digits": (["eval.sample_tokens=" + "9" * 5000], ["eval.sample_tokens"]),
    "wider than a slip allows": (["model.d_model=2000000"], ["model.d_model", "2000000", "1048576"]),
    "a value that is long": (["optim.lr=" + "x" * 5000], ["optim.lr is 'xxx", "...xxx", "allowed: a number"]),
    "a seed of 33 bits": (["seed=4294967295"], ["seed", "4294967295", "4294967294"]),
    "infinite in float32": (["optim.eps=1e300"], ["optim.eps", "1e+300", "3.4e+38"]),
    "zero in float32": (["optim.eps=1e-300"], ["optim.eps", "1e-300", "1.2e-38"]),
    "weights from a name too long": (["checkpoint.resume=" + "x" * 5000], ["checkpoint.resume", "too long"]),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_configuration_or_data_is_refused(name: str, files: Path, capsys: pytest.CaptureFixture[str]):
    overrides, words = WRONG[name]
    workdir = files / "run"
    argv = flags(*(o.replace("FILES", str(files)) for o in overrides))
    before = contents(files)
    code, error = in_process(["--config", str(CONFIG), "--workdir", str(workdir), *argv], capsys)
    assert code == 2
    error = "".join(line for line in error.splitlines(keepends=True) if not line.startswith("tokenizing"))  # progress
    assert error.count("\n") == 1, error
    assert all(word in error for word in words), error
    assert not workdir.exists()
    stores = files / "cache"  # token stores do not belong to the run
    assert {p: b for p, b in contents(files).items() if stores not in p.parents} == before


def test_a_missing_tracker_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(sys.modules, "wandb", None)  # as if it were not installed
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    argv = ["--config", str(CONFIG), "--workdir", str(tmp_path / "run"), *flags("log.wandb=True")]
    code, error = in_process(argv, capsys)
    assert code == 2 and error.count("\n") == 1 and "log.wandb" in error and "pip install" in error
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "argv, words",
    [
        ([], ["--config"]),
        (["--config", "FILES/none.py"], ["none.py", "no such file"]),
        (["--config", "FILES/config.py"], ["config.py", "ZeroDivisionError"]),
        (["--config", "CONFIG", "--workdri", "FILES/run"], ["--workdri"]),
        (["--config", "CONFIG", "extra"], ["extra"]),
        (["--config", "CONFIG", "--num_processes", "2"], ["--num_processes", "--coordinator"]),
        (
            ["--config", "CONFIG", "--coordinator", "a:1", "--num_processes", "2", "--process_id", "2"],
            ["--process_id", "2"],
        ),
        (["--config", "CONFIG", "--num_processes", "two"], ["--num_processes", "two"]),
        (
            ["--config", "CONFIG", "--coordinator", "a:1", "--num_processes", "0", "--process_id", "0"],
            ["--num_processes", "0", "1 to 100000"],
        ),
        (["--config", "CONFIG", "--workdir", ""], ["--workdir", "''"]),
        (["--config", "CONFIG", "--workdir", "x" * 300], ["--workdir", "too long"]),
        (["--config", "CONFIG", "--workdir", "~nosuchuser/run"], ["--workdir", "~nosuchuser/run"]),
        (["--config", "x" * 5000], ["--config", "too long"]),
        (["--config", "CONFIG", "--noconfig.deterministic=3"], ["--noconfig.deterministic=3", "no value"]),
        (["--config", "FILES/leaves.py"], ["leaves.py", "SystemExit"]),
        (["--config", "FILES/huge.py"], ["optim.lr", "3.4e+38"]),
    ],
)
def test_a_wrong_command_line_is_refused(
    argv: list[str], words: list[str], files: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(files)  # a run would create runs/ here
    before = contents(files)
    code, error = in_process([a.replace("FILES", str(files)).replace("CONFIG", str(CONFIG)) for a in argv], capsys)
    assert code == 2
    assert error.count("\n") == 1 and all(word in error for word in words), error
    assert contents(files) == before


@pytest.mark.parametrize("where", ["good.txt", "good.txt/below", "good.txt/far/below", "/proc/run", "/dev/null/run"])
def test_an_impossible_workdir_is_refused(where: str, files: Path, capsys: pytest.CaptureFixture[str]):
    before = contents(files)
    workdir = str(files / where)
    code, error = in_process(["--config", str(CONFIG), "--workdir", workdir, *flags()], capsys)
    assert code == 2
    assert error.count("\n") == 1 and workdir in error and "allowed" in error, error
    assert contents(files) == before


def test_a_workdir_of_another_run_or_program_is_refused(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    before = contents(finished)
    argv = ["--config", str(CONFIG), "--workdir", str(finished)]
    code, error = in_process([*argv, *flags("seed=5", "model.d_model=32")], capsys)
    assert code == 2 and error.count("\n") == 1
    assert "seed was 0 and is now 5" in error and "model.d_model was 16 and is now 32" in error, error
    assert contents(finished) == before

    workdir = tmp_path / "run"
    workdir.mkdir()
    (workdir / "config.json").write_text('{"name": "of another program"}')
    code, error = in_process(["--config", str(CONFIG), "--workdir", str(workdir), *flags()], capsys)
    assert code == 2 and error.count("\n") == 1 and "config.json" in error
    assert contents(tmp_path) == {workdir / "config.json": b'{"name": "of another program"}'}


def test_changed_data_is_refused(files: Path, capsys: pytest.CaptureFixture[str]):
    np.save(files / "ids.npy", np.arange(1000, dtype=np.uint16) % 60)
    keys = flags("data.source=tokens", f"data.path={files / 'ids.npy'}")
    argv = ["--config", str(CONFIG), "--workdir", str(files / "run"), *keys]
    assert in_process(argv, capsys) == (0, "")
    before = contents(files / "run")
    np.save(files / "ids.npy", np.arange(1000, dtype=np.uint16) % 59)
    code, error = in_process(argv, capsys)
    assert code == 2 and error.count("\n") == 1 and "data has changed" in error
    assert contents(files / "run") == before


@pytest.mark.parametrize("damage", ["truncated", "data missing", "metadata missing", "item missing"])
def test_damaged_checkpoints_end_with_exit_code_4(
    damage: str, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    workdir = Path(shutil.copytree(finished, tmp_path / "run"))
    newest = workdir / "checkpoints/2"
    for folder in (step / item for step in newest.parent.iterdir() for item in ("params", "train")):
        everything = [p for p in folder.rglob("*") if p.is_file()]
        if damage == "truncated":
            for path in everything:
                os.truncate(path, path.stat().st_size // 2)
        elif damage == "data missing":
            for path in everything:
                if path.parent.name == "d":  # the arrays
                    path.unlink()
        elif damage == "metadata missing":
            for path in folder.iterdir():
                if path.is_file():
                    path.unlink()
        else:
            shutil.rmtree(folder)
    before = contents(workdir)
    argv = ["--config", str(CONFIG), "--workdir", str(workdir), *flags("checkpoint.every_steps=1", "steps=4")]
    code, error = in_process(argv, capsys)
    assert code == 4, error
    assert error.count("\n") == 1 and str(newest) in error, error
    assert contents(workdir) == before
    assert tool("evaluate", "--workdir", workdir) == 4
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and str(newest) in error and "none of the 2 checkpoints is whole" in error, error


# The same, in processes of their own


def shell(*argv: object, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *map(str, argv)],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )


def test_exit_codes_of_processes(finished: Path, tmp_path: Path):
    wrong = shell("-m", "jaxlm.main", "--config", CONFIG, "--workdir", tmp_path / "run", "--config.model.num_heads=3")
    assert wrong.returncode == 2 and wrong.stderr.count("\n") == 1 and wrong.stdout == ""
    assert "model.num_heads is 3" in wrong.stderr and not list(tmp_path.iterdir())

    for name in ("generate", "evaluate"):
        wrong = shell(ROOT / f"tools/{name}.py", "--workdir", tmp_path, cwd=tmp_path)
        assert wrong.returncode == 2 and wrong.stderr.count("\n") == 1 and wrong.stdout == "", wrong

    workdir = Path(shutil.copytree(finished, tmp_path / "copy"))
    fine = shell(ROOT / "tools/evaluate.py", "--workdir", workdir, cwd=tmp_path)
    assert fine.returncode == 0 and fine.stderr == "" and fine.stdout.count("\n") == 1, fine
    for step in (workdir / "checkpoints").iterdir():
        shutil.rmtree(step / "params")
    damaged = shell("-m", "jaxlm.main", "--config", CONFIG, "--workdir", workdir, *flags("checkpoint.every_steps=1"))
    assert damaged.returncode == 4 and damaged.stderr.count("\n") == 1 and damaged.stdout == "", damaged


def test_a_command_stopped_by_ctrl_c_says_so(capsys: pytest.CaptureFixture[str]):
    def program() -> int:
        raise KeyboardInterrupt

    assert main.exit_code(program, "prepare_data.py") == 130
    assert re.fullmatch(r"prepare_data\.py: stopped; run the same command again, .*\n", capsys.readouterr().err)


def test_help_is_not_an_error():
    for argv in (["-m", "jaxlm.main"], [ROOT / "tools/generate.py"], [ROOT / "tools/evaluate.py"]):
        shown = shell(*argv, "--help")
        assert shown.returncode == 0 and shown.stderr == "" and "--workdir" in shown.stdout
