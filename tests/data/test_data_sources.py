"""Sources of text: which documents are read, which are held out, and which mistakes are refused."""

import hashlib
from pathlib import Path

import numpy as np
import pytest

from jaxlm.config import Config, UserError
from jaxlm.data import prepare
from jaxlm.data.sources import stdlib
from jaxlm.data.sources import text as sources_lib
from jaxlm.data.sources.documents import Split, held_out
from jaxlm.data.sources.opening import open_source
from jaxlm.data.sources.text import read_parts
from tests.corpora import LINES, documents, make_config, open_corpus, text, write


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return make_config(tmp_path)


def names(config: Config, split: Split) -> list[str]:
    return [d.name for d in documents(open_source(config.data), split) if d.first]


def test_one_file_is_split_by_characters(config: Config, tmp_path: Path):
    content = "añ漢\r\n" * 100 + "xyz"
    corpus = open_corpus(config, write(tmp_path, {"a.txt": content}) / "a.txt", val_fraction=0.1)
    cut = int(len(content) * 0.9)
    assert text(corpus, "train") == content[:cut]
    assert text(corpus, "val") == content[cut:]
    assert corpus.facts["train"]["documents"] == 1 and np.asarray(corpus.train)[0] == 256


@pytest.mark.parametrize("block", [100, 1000, 3000])
def test_long_files_read_in_parts_give_the_same_tokens(config: Config, tmp_path: Path, monkeypatch, block: int):
    path = write(tmp_path, {"a.txt": "line one of a pair\n\n\n    é漢 is the other\r\n" * 300}) / "a.txt"
    config.data.tokenizer, config.data.vocab_size = "sentencepiece", 320
    whole = open_corpus(config, path)
    monkeypatch.setattr(sources_lib, "BLOCK", block)
    assert len(list(read_parts(path))) > 2
    parts = open_corpus(config, path, cache_dir=str(tmp_path / "other"))
    assert parts.folder != whole.folder
    np.testing.assert_array_equal(parts.train, whole.train)
    np.testing.assert_array_equal(parts.val, whole.val)
    assert parts.facts == whole.facts and parts.facts["train"]["documents"] == 1


@pytest.mark.parametrize("block", [1, 7, 64, 1000])
def test_the_parts_of_a_file_join_to_the_file(tmp_path: Path, monkeypatch, block: int):
    monkeypatch.setattr(sources_lib, "BLOCK", block)
    content = LINES + "\n\n    é漢\n" * 50 + "z" * 300 + "\n\n\n"
    assert "".join(read_parts(write(tmp_path, {"a.txt": content}) / "a.txt")) == content


def test_folders_globs_and_validation_paths_select_files(config: Config, tmp_path: Path):
    files = {f"d/{i}.txt": f"document {i} " * 9 for i in range(40)} | {"d/sub/z.md": "no text file", "d/empty.txt": ""}
    write(tmp_path, files)
    config.data.val_fraction = 0.25
    for path in ("d", "d/*.txt", "d/**/*.md", "d/sub/z.md"):
        config.data.path = str(tmp_path / path)
        config.data.val_path = str(tmp_path / "d/7.txt")
        expected = {
            "d": {f"{i}.txt" for i in range(40)} - {"7.txt"} | {"sub/z.md"},
            "d/*.txt": {f"{i}.txt" for i in range(40)} - {"7.txt"},
            "d/**/*.md": {"sub/z.md"},
            "d/sub/z.md": {"z.md"},
        }[path]
        assert set(names(config, "train")) == expected
        assert names(config, "train") == sorted(names(config, "train"))
        assert names(config, "val") == ["7.txt"]


def test_documents_are_held_out_by_name_alone(config: Config, tmp_path: Path):
    write(tmp_path, {f"d/{i}.txt": f"document {i} " * 9 for i in range(60)})
    config.data.path, config.data.val_fraction = str(tmp_path / "d"), 0.1
    train, val = names(config, "train"), names(config, "val")
    assert train and val and not set(train) & set(val) and len(train) + len(val) == 60
    assert all(int(hashlib.sha1(n.encode()).hexdigest(), 16) % 10 == 0 for n in val)
    for name in ["1.txt", "30.txt"]:
        (tmp_path / "d" / name).unlink()
    write(tmp_path, {"d/new.txt": "another one"})
    assert set(names(config, "val")) - {"new.txt"} == set(val) - {"1.txt", "30.txt"}


def test_about_a_twentieth_of_modules_is_held_out():
    held = sum(held_out(f"package/module_{i}.py", 0.05) for i in range(20_000))
    assert 850 < held < 1150


@pytest.mark.parametrize("share", [0.01, 0.05, 0.15, 0.3, 0.4, 0.5, 0.6, 0.7, 0.95])
def test_the_requested_share_is_held_out(share: float):
    held = np.mean([held_out(f"a.jsonl:{i}", share) for i in range(20_000)])
    assert abs(held - share) < 4 * np.sqrt(share * (1 - share) / 20_000)


def test_of_few_files_each_split_has_at_least_one(config: Config, tmp_path: Path):
    write(tmp_path, {"d/a.txt": LINES, "d/b.txt": LINES, "d/c.txt": LINES})
    config.data.path = str(tmp_path / "d")
    by_hash = sorted(["a.txt", "b.txt", "c.txt"], key=lambda n: hashlib.sha1(n.encode()).hexdigest())
    config.data.val_fraction = 1e-9
    assert names(config, "val") == by_hash[:1] and names(config, "train") == sorted(by_hash[1:])
    config.data.val_fraction = 0.999
    assert names(config, "train") == by_hash[-1:] and names(config, "val") == sorted(by_hash[:-1])


def test_stdlib_leaves_out_tests_and_packages(config: Config, tmp_path: Path, monkeypatch):
    files = {f"module_{i}.py": f"x = {i}\n" * 20 for i in range(150)}
    others = {"test/a.py": "x", "pkg/tests/b.py": "x", "site-packages/c.py": "x", "pkg/__init__.py": "", "d.txt": "x"}
    write(tmp_path / "lib", {**files, **others, "latin.py": b"\xe9"})
    monkeypatch.setattr(stdlib.sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path / "lib")})
    config.data.source = "stdlib"
    assert sorted(names(config, "train") + names(config, "val")) == sorted(files)
    corpus = prepare(config, progress=False)
    assert corpus.facts["skipped"] == 1
    assert corpus.facts["val"]["documents"] == sum(held_out(n, 0.05) for n in files) > 0


def test_the_real_stdlib_is_read(config: Config):
    config.data.source = "stdlib"
    source = open_source(config.data)
    assert source.num_bytes > 5e6
    assert "argparse.py" in names(config, "train") + names(config, "val")


def test_unusable_texts_are_refused(config: Config, tmp_path: Path):
    write(tmp_path, {"empty.txt": "", "bad.txt": b"caf\xc3\xa9 " + b"x" * 50 + b"\xff!", "short.txt": "ab",
                     "few/a.txt": LINES, "few/b.txt": LINES})  # fmt: skip
    (tmp_path / "none").mkdir()
    cases = {
        "nowhere.txt": r"data\.path is '.*nowhere\.txt': no such file or folder",
        "*.csv": r"data\.path is '.*\*\.csv': no files there",
        "none": r"no files there",
        "empty.txt": r"nothing but empty files",
        "bad.txt": r"bad\.txt: not UTF-8 at byte 56",
        "short.txt": r"^data\.path=.*short\.txt: 2 training tokens; allowed: at least seq_len \+ 1 = 17",
    }
    for path, message in cases.items():
        with pytest.raises(UserError, match=message):
            open_corpus(config, tmp_path / path)
    with pytest.raises(UserError, match=r"data\.val_path is '.*gone'"):
        open_corpus(config, tmp_path / "few", val_path=str(tmp_path / "gone"))
    with pytest.raises(UserError, match=r"every file is in data\.val_path too"):
        open_corpus(config, tmp_path / "few", val_path=str(tmp_path / "few"))
    with pytest.raises(UserError, match=r"0 validation tokens"):
        open_corpus(config, tmp_path / "few" / "a.txt", val_path="", val_fraction=1e-17)
    assert not [p for p in Path(config.data.cache_dir).glob("*") if p.is_dir()]  # nothing of them remains


@pytest.mark.parametrize("block", [5, 1 << 20])
def test_the_position_of_bad_utf8_is_named(tmp_path: Path, monkeypatch, block: int):
    monkeypatch.setattr(sources_lib, "BLOCK", block)
    for content, at in ((b"\n" + "漢".encode() * 9 + b"\x80", 28), (b"a" * 12 + b"\xe6\xbc", 12)):
        path = write(tmp_path, {"a": content}) / "a"
        with pytest.raises(UserError, match=rf"at byte {at} "):
            list(read_parts(path))
