"""A run resumes with the data that it began with: the same content, wherever it is, in the same order."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from configs.base import get_config
from jaxlm.config import UserError, changes
from tests.corpora import LINES, make_config, open_corpus, write
from tests.runs import lines, run

KEYS: dict[str, Any] = {
    "steps": 2,
    "data.source": "text",
    "data.tokenizer": "bytes",
    "eval.sample_tokens": 0,
    "eval.batches": 1,
    "log.every_steps": 1,
    "checkpoint.every_steps": 0,
    "eval.every_steps": 0,
    "parallel.devices": 1,
}


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    return write(tmp_path, {f"txt/{i}.txt": LINES[: 800 + i] for i in range(6)}) / "txt"


def test_a_run_resumes_with_the_same_data_under_another_name(
    texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """The data may be moved and its path spelled differently. Changed data and another split are refused."""
    assert run(tmp_path / "run", **KEYS | {"data.path": texts}) == 0
    moved = f"{tmp_path}/books/../books/*.txt"
    shutil.move(texts, tmp_path / "books")
    assert run(tmp_path / "run", **KEYS | {"data.path": moved, "steps": 3}) == 0
    assert f"data.path '{texts}' -> '{moved}'" in capsys.readouterr().out
    (tmp_path / "books/0.txt").write_text(LINES[:900])
    before = (tmp_path / "run/config.json").read_bytes()
    said = r"the data has changed .*fingerprint .*data\.path '.*txt' -> '.*/books'"
    with pytest.raises(UserError, match=said):
        run(tmp_path / "run", **KEYS | {"data.path": tmp_path / "books", "steps": 9})
    with pytest.raises(UserError, match=r"data\.val_fraction was 0\.05 and is now 0\.1"):
        run(tmp_path / "run", **KEYS | {"data.path": moved, "data.val_fraction": 0.1, "steps": 9})
    assert (tmp_path / "run/config.json").read_bytes() == before


def test_only_paths_of_data_may_change():
    old, new = get_config(), get_config()
    old.data.mixture, new.data.mixture = "3 text a; 1 tfds lm1b", "3 text /b/a;1 tfds lm1b"
    old.data.tokenizer_path, new.data.tokenizer_path = "x", "y"
    assert set(changes(old, new)[0]) == {"data.mixture", "data.tokenizer_path"} and not changes(old, new)[1]
    for other in ("2 text a; 1 tfds lm1b", "3 jsonl a; 1 tfds lm1b", "3 text a; 1 tfds c4", "3 text a", ""):
        new.data.mixture = other
        assert "data.mixture" in changes(old, new)[1]


def test_a_store_is_found_again_under_another_name_of_its_texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The same store is found, because sources name files relative to their folder."""
    monkeypatch.chdir(tmp_path)
    config, records = make_config(tmp_path), "".join(json.dumps({"text": f"record {i} " * 9}) + "\n" for i in range(60))
    for source, files in (("text", {"a/1.txt": LINES, "a/b/2.txt": LINES * 2}), ("jsonl", {"a/1": records})):
        folder = write(tmp_path / source, files)
        found = open_corpus(config, folder / "a", source=source, tokenizer="chars")
        shutil.copytree(folder / "a", folder / "c")
        for path in (f"{source}/a", f"{source}/a/", f"./{source}/a/**/*", folder / "c"):
            again = open_corpus(config, path)
            assert (again.folder, again.fingerprint) == (found.folder, found.fingerprint)


def test_a_run_keeps_the_order_that_it_began_with(tmp_path: Path):
    """An older jaxlm did not save the version, so its runs keep version 1. Of 41 windows, version 2 leaves one over."""
    np.save(tmp_path / "ids.npy", np.random.default_rng(0).integers(0, 50, 16 * 41 + 1))
    np.save(tmp_path / "val.npy", np.arange(40))
    keys = KEYS | {"data.source": "tokens", "data.tokenizer": "sentencepiece", "data.path": tmp_path / "ids.npy",
                   "data.val_path": tmp_path / "val.npy", "data.vocab_size": 50}  # fmt: skip
    assert run(tmp_path / "run", **keys) == 0
    path = tmp_path / "run/config.json"
    content = json.loads(path.read_text())
    assert content.pop("order") == 2
    path.write_text(json.dumps(content))
    assert run(tmp_path / "run", **keys | {"steps": 3}) == 0
    assert json.loads(path.read_text())["order"] == 1
    epochs = [m["epochs"] for m in lines(tmp_path / "run") if "loss" in m]
    assert epochs == [8 / 40, 16 / 40, 24 / 41]
    path.write_text(json.dumps(content | {"order": 99}))
    with pytest.raises(UserError, match=r"config\.json: order is 99; allowed: 1, 2"):
        run(tmp_path / "run", **keys | {"steps": 9})
