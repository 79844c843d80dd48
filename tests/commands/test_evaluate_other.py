"""`jaxlm evaluate` on data other than the run's: which part is scored, and that nothing else is read."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from jaxlm.run.open_run import open_run
from tests.corpora import LINES, write
from tests.data.test_data_folders import CHARS, meta_of, nanogpt
from tests.decoders import logits_of
from tests.exit_codes import tool
from tests.runs import run

OTHER = "Something else, which nobody has seen: äöü.\n" * 60


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose text and token store are deleted."""
    folder = write(tmp_path_factory.mktemp("texts"), {"train/1.txt": LINES, "train/2.txt": LINES, "other.txt": OTHER})
    keys = {
        "steps": 1,
        "data.source": "text",
        "data.path": folder / "train",
        "data.tokenizer": "bytes",
        "data.cache_dir": folder / "cache",
        "eval.batches": 1,
        "eval.sample_tokens": 0,
    }
    assert run(folder / "run", **keys) == 0
    shutil.rmtree(folder / "train")
    shutil.rmtree(folder / "cache")
    return folder


def scores(capsys: pytest.CaptureFixture[str], folder: Path, **keys: Any) -> tuple[dict[str, Any], str]:
    capsys.readouterr()
    assert tool("evaluate", "--workdir", folder / "run", *(f"--config.data.{k}={v}" for k, v in keys.items())) == 0
    out, err = capsys.readouterr()
    return json.loads(out.splitlines()[-1]), err


def test_a_file_is_scored_as_a_whole_and_nothing_else_is_read(texts: Path, capsys: pytest.CaptureFixture[str]):
    found, _ = scores(capsys, texts, val_path=texts / "other.txt")
    assert found["eval_tokens"] == len(OTHER.encode())  # all except the bos
    run = open_run(texts / "run", None)
    ids = np.concatenate([[256], np.frombuffer(OTHER.encode(), np.uint8)]).astype(np.int32)
    assert (len(ids) - 1) % 16 == 4
    x, y = (np.concatenate([part, np.zeros(12, np.int32)]).reshape(-1, 16) for part in (ids[:-1], ids[1:]))
    logits = np.asarray(jax.jit(logits_of(run.model))(run.params, x), np.float64)
    log_p = np.take_along_axis(logits, y[..., None], -1)[..., 0] - np.log(np.exp(logits).sum(-1))
    nll = -float(log_p.ravel()[:-12].sum())
    assert found["eval_loss"] == pytest.approx(nll / (len(ids) - 1), rel=1e-5)
    assert found["eval_bits_per_byte"] == pytest.approx(nll / math.log(2) / (len(ids) - 1), rel=1e-5)
    made = [json.loads(p.read_text()) for p in (texts / "cache").glob("*/manifest.json")]
    assert [sum(shard["train"]["tokens"] for shard in m["shards"]) for m in made] == [0]


def test_data_path_scores_its_held_out_part(texts: Path, capsys: pytest.CaptureFixture[str]):
    found, said = scores(capsys, texts, path=texts / "other.txt", val_fraction=0.25)
    assert found["eval_tokens"] == pytest.approx(len(OTHER.encode()) / 4, rel=0.02)
    assert f"scores the held-out part of data.path={texts / 'other.txt'}; --config.data.val_path scores all" in said


def test_records_and_ids(texts: Path, finished: Path, capsys: pytest.CaptureFixture[str]):
    """Records scored by a run on text, and ids scored by a run on ids."""
    (texts / "r.jsonl").write_text("".join(json.dumps({"text": f"record {i}"}) + "\n" for i in range(9)))
    found, _ = scores(capsys, texts, val_path=texts / "r.jsonl", source="jsonl")
    assert found["eval_tokens"] == 9 * (1 + len("record 0")) - 1
    np.save(texts / "ids.npy", np.arange(64))
    (texts / "ids").mkdir()
    shutil.copytree(finished, texts / "ids/run")
    found, _ = scores(capsys, texts / "ids", val_path=texts / "ids.npy", source="tokens")
    assert found["eval_tokens"] == 63


def test_text_is_scored_by_a_run_on_a_folder_of_nanogpt(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    nanogpt(tmp_path / "d", meta_of(CHARS))
    write(tmp_path, {"text.txt": CHARS * 9})
    keys = {"steps": 1, "data.source": "tokens", "data.path": tmp_path / "d", "eval.sample_tokens": 0}
    assert run(tmp_path / "run", **keys) == 0
    found, _ = scores(capsys, tmp_path, val_path=tmp_path / "text.txt", source="text")
    assert found["eval_tokens"] == 9 * len(CHARS) and found["eval_bits_per_byte"] > 0


@pytest.mark.parametrize(
    "other, source", [("text TEXTS/other.txt", "text"), ("stdlib", "text"), ("jsonl r.jsonl", None)]
)
def test_other_data_takes_its_source_from_the_files_of_the_mixture(
    other: str, source: str | None, texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    mixed = Path(shutil.copytree(texts / "run", tmp_path / "run"))
    saved = json.loads((mixed / "config.json").read_text())
    saved["config"]["data"] |= {"source": "synthetic", "path": "", "mixture": f"1 text gone; 1 {other}"}
    (mixed / "config.json").write_text(json.dumps(saved))
    if source:
        found, _ = scores(capsys, tmp_path, val_path=texts / "other.txt")
        assert found["eval_tokens"] == len(OTHER.encode())
        return
    assert tool("evaluate", "--workdir", mixed, f"--config.data.val_path={texts / 'other.txt'}") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "data.source is not given; allowed" in error and "text, jsonl, parquet" in error


def test_data_that_cannot_be_scored_is_refused(texts: Path, capsys: pytest.CaptureFixture[str]):
    cases = {
        "data.val_path=nowhere.txt": "data.val_path is 'nowhere.txt': no such file",
        "data.val_path=": "data.val_path is ''; allowed: a file or a folder",
        "data.source=stdlib --config.data.val_path=x": "data.val_path is 'x'; allowed: none with data.source=stdlib",
    }
    for arguments, said in cases.items():
        assert tool("evaluate", "--workdir", texts / "run", *f"--config.{arguments}".split()) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and said in error, error


def test_a_token_store_as_val_path_is_refused(tmp_path: Path, finished: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "manifest.json").write_text("{}")
    argv = ("--config.data.source=tokens", f"--config.data.val_path={tmp_path}")
    assert tool("evaluate", "--workdir", finished, *argv) == 2
    assert "a token store; allowed: files of token ids" in capsys.readouterr().err
