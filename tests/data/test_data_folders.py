"""Folders as people have them: which files are data, which are left out, and what is printed about them."""

import json
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxlm.config import Config, UserError
from jaxlm.data import prepare
from jaxlm.data.sources.files import identify
from jaxlm.data.sources.nanogpt import read_meta
from tests.corpora import LINES, make_config, text, write

RECORDS = "".join(json.dumps({"text": f"record {i} " * 9}) + "\n" for i in range(60))
CHARS = "\n !abcxyzé"


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return make_config(tmp_path)


def opened(config: Config, path: Path | str, capsys: pytest.CaptureFixture[str], **keys: Any) -> tuple[Any, list[str]]:
    """Returns the corpus, and the lines printed about its files."""
    config.data.path = str(path)
    for key, value in keys.items():
        setattr(config.data, key, value)
    capsys.readouterr()
    corpus = prepare(config)
    return corpus, [line for line in capsys.readouterr().err.splitlines() if not line.startswith("tokenizing")]


def test_files_beside_the_data_are_left_out_and_counted(config: Config, tmp_path: Path, capsys: Any):
    import pyarrow
    import pyarrow.parquet

    beside = {".gitattributes": "x", ".cache/huggingface/a.parquet": "x", "README.md": "# data", "_SUCCESS": ""}
    folder = write(tmp_path / "d", beside)
    pyarrow.parquet.write_table(pyarrow.table({"text": [LINES] * 30}), folder / "0.parquet")
    corpus, said = opened(config, folder, capsys, source="parquet")
    assert corpus.facts["train"]["documents"] + corpus.facts["val"]["documents"] == 30
    names = ".cache/huggingface/a.parquet, .gitattributes, README.md, …"
    left_out = f"leaves out 4 files that are hidden or of another kind ({names})"
    assert said == [f"data.path={folder}: {left_out}; a glob takes every file that it matches"]
    with pytest.raises(UserError, match=r"gitattributes: unreadable as Parquet"):
        opened(config, f"{folder}/*", capsys)


def test_without_known_suffixes_all_visible_files_are_data(config: Config, tmp_path: Path, capsys: Any):
    folder = write(tmp_path / "d", {"part-0": RECORDS, "part-1.gz": b"", ".hidden": "x"})
    corpus, said = opened(config, folder, capsys, source="jsonl")
    assert corpus.facts["train"]["documents"] + corpus.facts["val"]["documents"] == 60
    assert len(said) == 1 and "leaves out a file that is hidden or of another kind (.hidden)" in said[0]


def test_a_text_folder_leaves_out_only_hidden_files(config: Config, tmp_path: Path, capsys: Any):
    folder = write(tmp_path / "d", {"a.txt": LINES, "README.md": LINES.upper(), ".git/config": "no text of mine\0"})
    corpus, said = opened(config, folder, capsys)
    assert sorted((text(corpus, "train"), text(corpus, "val"))) == sorted((LINES, LINES.upper()))
    assert len(said) == 1 and "(.git/config)" in said[0]
    write(tmp_path / "e", {".a": LINES})
    with pytest.raises(UserError, match="nothing but hidden files"):
        opened(config, tmp_path / "e", capsys)


def test_a_hint_is_printed_if_records_are_read_as_text(config: Config, tmp_path: Path, capsys: Any):
    write(tmp_path, {"d/a.jsonl": RECORDS, "d/c.txt": LINES, "e/c.txt": LINES})
    corpus, said = opened(config, tmp_path / "d", capsys)
    assert "record" in text(corpus, "train") + text(corpus, "val")
    assert said == [
        f"data.path={tmp_path / 'd'}: a .jsonl file is read as plain text; data.source=jsonl reads the "
        "texts of its records"
    ]
    assert opened(config, tmp_path / "e/c.txt", capsys)[1] == []


def nanogpt(folder: Path, meta: Any, protocol: int = 4) -> tuple[np.ndarray, np.ndarray]:
    folder.mkdir(exist_ok=True)
    ids = np.random.default_rng(0).integers(0, len(CHARS), 3000).astype("<u2")
    for name, part in (("train.bin", ids[:2700]), ("val.bin", ids[2700:])):
        part.tofile(folder / name)
    (folder / "meta.pkl").write_bytes(meta if isinstance(meta, bytes) else pickle.dumps(meta, protocol))
    return ids[:2700], ids[2700:]


def meta_of(chars: str) -> dict[str, Any]:
    return {"vocab_size": len(chars), "itos": dict(enumerate(chars)), "stoi": {c: i for i, c in enumerate(chars)}}


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_a_folder_of_nanogpt_is_read_with_its_tokenizer(config: Config, tmp_path: Path, protocol: int, capsys: Any):
    train, val = nanogpt(tmp_path / "char", meta_of(CHARS), protocol)
    corpus, said = opened(config, tmp_path / "char", capsys, source="tokens")
    np.testing.assert_array_equal(corpus.train, train)
    np.testing.assert_array_equal(corpus.val, val)
    assert said == [] and corpus.vocab_size == len(CHARS) + 1
    assert corpus.tokenizer.decode(train[:50]) == "".join(CHARS[i] for i in train[:50])
    assert corpus.tokenizer.encode(["abc"])[0].tolist() == [CHARS.index(c) for c in "abc"]


def test_a_folder_of_nanogpt_without_a_table_of_characters_has_no_tokenizer(
    config: Config, tmp_path: Path, capsys: Any
):
    nanogpt(tmp_path / "d", {"vocab_size": 50})
    corpus, said = opened(config, tmp_path / "d", capsys, source="tokens", vocab_size=50)
    assert corpus.vocab_size == 50 and corpus.tokenizer is None
    assert len(said) == 1 and "meta.pkl: ignored, because it is not a table of characters" in said[0]
    (tmp_path / "d/meta.pkl").unlink()
    assert opened(config, tmp_path / "d", capsys)[1] == []


@pytest.mark.parametrize("name", ["train.bin", "val.bin"])
def test_a_folder_of_nanogpt_with_an_empty_file_is_refused(name: str, config: Config, tmp_path: Path, capsys: Any):
    nanogpt(tmp_path / "d", meta_of(CHARS))
    (tmp_path / "d" / name).write_bytes(b"")
    with pytest.raises(UserError, match=f"{name}: empty; allowed: token ids"):
        opened(config, tmp_path / "d", capsys, source="tokens")


def test_a_missing_file_is_named(tmp_path: Path):
    with pytest.raises(UserError, match=r"gone\.txt: unreadable"):
        identify({"gone.txt": tmp_path / "gone.txt"})


class Code:
    def __reduce__(self) -> Any:
        return os.mkdir, ("made by a pickle",)


def test_no_pickle_is_executed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A pickle that would run code, or whose instructions make no sense, is ignored."""
    monkeypatch.chdir(tmp_path)
    good = pickle.dumps(meta_of(CHARS))
    bad = [b"", b"junk", good[:-20], good.replace(b"itos", b"x"), pickle.dumps(Code()), pickle.dumps({"itos": Code()}),
           pickle.dumps(meta_of("ba")), pickle.dumps({"itos": {0: "ab"}}), pickle.dumps({"itos": {1: "a"}}),
           pickle.dumps({"itos": ["a"]}), b"\x80\x04u.", b"\x80\x04(u.", b"\x80\x04h\x05.", b"\x80\x04s.",
           b"\x80\x04\x94.",
           b"\x80\x04}(h\x00u.", b"\x80\x04}\x94h\x00h\x00s.", b"\x80\x04}X\xff\xff\xff\x7f."]  # fmt: skip
    path = tmp_path / "meta.pkl"
    for content in bad:
        path.write_bytes(content)
        assert read_meta(path) is None, content
    for i in range(len(good)):  # damage causes no error, and gives only tables of characters
        path.write_bytes(good[:i] + bytes([good[i] ^ 0x15]) + good[i + 1 :])
        found = read_meta(path)
        assert found is None or all(len(c) == 1 for c in found.alphabet)
    assert os.listdir(tmp_path) == ["meta.pkl"]
    path.write_bytes(good)
    tokenizer = read_meta(path)
    assert tokenizer and tokenizer.alphabet == sorted(CHARS)
