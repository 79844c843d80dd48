"""A mistake with a tool prints one line that names it, ends with the documented exit code, and writes nothing."""

import shutil
from pathlib import Path

import pytest

from tests.exit_codes import contents, tool
from tests.runs import CONFIG


@pytest.mark.parametrize("name", ["generate", "evaluate"])
@pytest.mark.parametrize(
    "argv, words",
    [
        (["--workdir", "EMPTY"], ["--workdir", "config.json"]),
        (["--workdir", "EMPTY/none"], ["--workdir", "config.json"]),
        (["--workdir", "BEFORE"], ["--workdir", "no checkpoints"]),
        (["--workdir", "RUN", "--step", "7"], ["--step", "7", "1, 2"]),
        (["--workdir", "RUN", "--step", "last"], ["--step", "last"]),
        (["--workdir", "RUN", "--stpe", "1"], ["--stpe"]),
        ([], ["--workdir"]),
    ],
)
def test_wrong_runs_and_steps_are_refused(
    name: str, argv: list[str], words: list[str], finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "empty").mkdir()
    (tmp_path / "before").mkdir()
    shutil.copy(finished / "config.json", tmp_path / "before")
    places = {"EMPTY": tmp_path / "empty", "BEFORE": tmp_path / "before", "RUN": finished}
    before = contents(tmp_path) | contents(finished)
    for word, folder in places.items():
        argv = [a.replace(word, str(folder)) for a in argv]
    assert tool(name, *argv) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and all(word in error for word in words), error
    assert contents(tmp_path) | contents(finished) == before
    assert not (tmp_path / "before/checkpoints").exists()


@pytest.mark.parametrize(
    "argv, words",
    [
        (["--temperature=-1"], ["--temperature", "-1"]),
        (["--top_p=0"], ["--top_p", "0"]),
        (["--num_samples=0"], ["--num_samples", "0"]),
        (["--num_samples=99999999999999"], ["--num_samples", "2147483647"]),
        (["--max_new_tokens=99999999999999"], ["--max_new_tokens", "2147483647"]),
        (["--temperature=inf"], ["--temperature", "inf"]),
        (["--seed=99999999999999"], ["--seed", "4294967294"]),
        (["--prompt=a\udcff"], ["--prompt", "UTF-8"]),
        (["--prompt=x"], ["tokenizer"]),  # a run on bare tokens
    ],
)
def test_wrong_options_of_generate_are_refused(
    argv: list[str], words: list[str], finished: Path, capsys: pytest.CaptureFixture[str]
):
    assert tool("generate", "--workdir", finished, *argv) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and all(word in error for word in words), error


def test_evaluate_refuses_wrong_keys(finished: Path, capsys: pytest.CaptureFixture[str]):
    for override, word in (("data.nothing=1", "data.nothing"), ("data.source=paper", "paper")):
        assert tool("evaluate", "--workdir", finished, f"--config.{override}") == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and word in error


@pytest.mark.parametrize("override", ["model.d_model=32", "eval.batches=2", "optim.lr=0.1"])
def test_evaluate_refuses_keys_that_it_would_ignore(override: str, finished: Path, capsys: pytest.CaptureFixture[str]):
    """Keys that would change nothing, or change the model, are refused."""
    assert tool("evaluate", "--workdir", finished, f"--config.{override}") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and override.split("=")[0] in error and "as in the run" in error
    assert tool("evaluate", "--workdir", finished, "--config.batch_size=16") == 0
    assert tool("evaluate", "--workdir", finished, "--config.seq_len=32") == 0  # positions are rope's


@pytest.mark.parametrize("name", ["chaos", "chaos_signals"])
def test_a_file_in_place_of_a_folder_is_refused(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "file").write_text("mine")
    config = ["--config", CONFIG] if name == "chaos" else []
    assert tool(name, *config, "--workdir", tmp_path / "file") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and str(tmp_path / "file") in error and "allowed: a new folder" in error
    assert contents(tmp_path) == {tmp_path / "file": b"mine"}
