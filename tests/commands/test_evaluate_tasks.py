"""Mistakes with `jaxlm evaluate --tasks` that show before the harness is imported. tests/interop/ has the rest."""

from pathlib import Path

import pytest

from tests.exit_codes import contents, tool


@pytest.mark.parametrize(
    "argv, words",
    [
        (["--tasks", "arc_easy"], ["pip install 'lm_eval>="]),  # which is not installed
        (["--tasks", ""], ["--tasks is ''", "names of tasks"]),
        (["--tasks", "a", "--num_fewshot=-1"], ["--num_fewshot is '-1'", "0 to"]),
        (["--tasks", "a", "--limit", "many"], ["--limit is 'many'"]),
        (["--tasks", "a", "--limit", "0"], ["--limit is '0'"]),
        (["--tasks", "a", "--batch_size", "0"], ["--batch_size is '0'", "1 to"]),
        (["--tasks", "a", "--max_length", "1"], ["--max_length is '1'", "2 to"]),
        (["--tasks", "a", "--include_path", "none/there"], ["--include_path is 'none/there'"]),
        (["--tasks", "a", "--config.seq_len=8"], ["--config.seq_len=8", "--tasks"]),
        (["--limit", "3"], ["--limit", "without --tasks"]),
        (["--apply_chat_template"], ["--apply_chat_template", "without --tasks"]),
    ],
)
def test_mistakes(
    argv: list[str],
    words: list[str],
    finished: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)  # the peers' environment has it
    before = contents(finished)
    assert tool("evaluate", "--workdir", finished, *argv) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and all(word in error for word in words), error
    assert contents(finished) == before
