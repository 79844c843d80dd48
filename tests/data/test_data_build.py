"""Processes build a token store, which is complete or absent, whatever ends the build."""

import contextlib
import gzip
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxlm.config import Config, UserError
from jaxlm.data import build as build_lib
from jaxlm.data import store as store_lib
from jaxlm.data.sources import files as files_lib
from tests.corpora import LINES, make_config, open_corpus, text, write

ROOT = Path(__file__).resolve().parents[2]


def none_is_left() -> bool:
    """Returns whether all child processes have ended; the pool's thread takes a moment to notice the end of one."""
    deadline = time.monotonic() + 10
    while multiprocessing.active_children() and time.monotonic() < deadline:
        time.sleep(0.01)
    return not multiprocessing.active_children()


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return make_config(tmp_path)


SCRIPT = """
import sys
sys.path.insert(0, {root!r})
from configs.base import get_config
from jaxlm.data import prepare
from jaxlm.data.sources import text as sources
import time
c = get_config()
c.seq_len, c.data.source, c.data.tokenizer, c.data.path, c.data.cache_dir = 16, "text", "bytes", {path!r}, {cache!r}
read = sources.read_parts
def slow(*part):
    time.sleep({sleep})
    yield from read(*part)
sources.read_parts = slow
print(prepare(c).fingerprint)
"""


def start(config: Config, path: Path, sleep: float) -> subprocess.Popen:
    script = SCRIPT.format(root=str(ROOT), path=str(path), cache=config.data.cache_dir, sleep=sleep)
    return subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_processes_that_start_together_share_one_store(config: Config, tmp_path: Path):
    path = write(tmp_path, {"a.txt": LINES}) / "a.txt"
    processes = [start(config, path, sleep=0.5) for _ in range(3)]
    outputs = [p.communicate(timeout=60) for p in processes]
    assert [p.returncode for p in processes] == [0, 0, 0], outputs
    assert len({out.splitlines()[-1] for out, _ in outputs}) == 1
    messages = "".join(err for _, err in outputs)
    assert messages.count("tokenizing: ") == 1  # one of them did the work
    assert "waiting for the process" in messages
    assert len(list(Path(config.data.cache_dir).glob("*/manifest.json"))) == 1


def test_a_build_that_is_killed_leaves_no_store(config: Config, tmp_path: Path):
    path = write(tmp_path, {"a.txt": LINES}) / "a.txt"
    process = start(config, path, sleep=2)
    cache, deadline = Path(config.data.cache_dir), time.monotonic() + 30
    while not list(cache.glob("*.building/train/00000.bin")) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert list(cache.glob("*.building/train/00000.bin")), "killed too early or too late to mean something"
    assert not [p for p in cache.iterdir() if p.is_dir() and p.suffix != ".building"]
    corpus = open_corpus(config, path)
    assert text(corpus, "train") + text(corpus, "val") == LINES
    assert not list(cache.glob("*.building"))


def test_a_full_disk_is_reported_and_leaves_no_store(config: Config, tmp_path: Path, monkeypatch):
    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(build_lib.os, "fsync", full)
    with pytest.raises(UserError, match=r"data\.cache_dir .*No space left"):
        open_corpus(config, write(tmp_path, {"a.txt": LINES}) / "a.txt")
    assert [p.suffix for p in Path(config.data.cache_dir).iterdir()] == [".lock"]


def shards_of(config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Writes and returns a folder of several units: small documents, a document that is cut, and a compressed file."""
    monkeypatch.setattr(files_lib, "UNIT_BYTES", 20_000)
    files: dict[str, str | bytes] = {f"d/{i:02}.txt": f"{i}\n" + LINES[: 100 * i] for i in range(40)}
    write(tmp_path, files | {"d/long.txt": LINES * 8 + "\n\n\nend", "d/packed.txt.gz": gzip.compress(LINES.encode())})
    config.data.val_fraction = 0.2
    return tmp_path / "d"


@pytest.mark.parametrize("tokenizer", ["bytes", "sentencepiece"])
def test_shards_made_by_processes_hold_what_one_process_makes(config: Config, tmp_path: Path, monkeypatch, tokenizer):
    config.data.tokenizer, config.data.vocab_size = tokenizer, 320
    folder = shards_of(config, tmp_path, monkeypatch)
    many = open_corpus(config, folder)
    assert many.folder and len(many.train.shards) > 5 and none_is_left()
    monkeypatch.setattr(store_lib, "SHAPE", [1])  # so that another store is made
    monkeypatch.setattr(files_lib, "UNIT_BYTES", 1 << 25)
    one = open_corpus(config, folder)
    assert len(one.train.shards) == 1 and one.facts == many.facts
    for split in ("train", "val"):
        np.testing.assert_array_equal(getattr(one, split), getattr(many, split))
        np.testing.assert_array_equal(getattr(one, split).starts, getattr(many, split).starts)
    monkeypatch.setattr(build_lib, "num_processes", lambda: 1)
    monkeypatch.setattr(files_lib, "UNIT_BYTES", 20_000)
    alone = open_corpus(config, folder, cache_dir=str(tmp_path / "alone"))
    assert alone.fingerprint == many.fingerprint


def test_only_unfinished_shards_are_made_again(config: Config, tmp_path: Path, monkeypatch):
    folder = shards_of(config, tmp_path, monkeypatch)
    whole = open_corpus(config, folder)
    monkeypatch.setattr(build_lib, "num_processes", lambda: 1)
    make = build_lib._make_shard
    made: list[int] = []

    def counted(path: Path, index: int, *rest: Any) -> Any:
        if len(made) == 3:
            raise error
        made.append(index)
        return make(path, index, *rest)

    monkeypatch.setattr(build_lib, "_make_shard", counted)
    for error in (KeyboardInterrupt(), OSError(28, "No space left on device")):
        made.clear()
        cache = tmp_path / type(error).__name__
        with pytest.raises((KeyboardInterrupt, UserError), match=r"^$|No space left.*kept in .*building"):
            open_corpus(config, folder, cache_dir=str(cache))
        assert made == [0, 1, 2] and not list(cache.glob("*/manifest.json"))
        monkeypatch.setattr(build_lib, "_make_shard", lambda p, i, *rest: made.append(i) or make(p, i, *rest))
        again = open_corpus(config, folder)
        assert made == list(range(len(whole.train.shards))) and again.fingerprint == whole.fingerprint
        monkeypatch.setattr(build_lib, "_make_shard", counted)


def test_a_bad_file_among_many_ends_all_processes(config: Config, tmp_path: Path, monkeypatch):
    folder = shards_of(config, tmp_path, monkeypatch)
    write(folder, {"11.txt": b"caf\xe9 " * 9})
    with pytest.raises(UserError, match=r"11\.txt: not UTF-8 at byte 3"):
        open_corpus(config, folder)
    assert none_is_left()
    assert not [p for p in Path(config.data.cache_dir).iterdir() if p.is_dir()]
    corpus = open_corpus(config, folder, on_error="skip")
    assert corpus.facts["skipped"] == 1
    assert sum(corpus.facts[s]["documents"] for s in ("train", "val")) == 41


def killed(*args: object) -> None:
    """Ends the process as the kernel does when memory runs out."""
    os._exit(137)


def killed_later(folder: Path, index: int, *rest: Any) -> Any:
    if index == 3:
        while not (folder / "00000.json").exists():
            time.sleep(0.01)
        os._exit(137)
    return build_lib._make_shard(folder, index, rest[0], build_lib._tokenizer, *rest[1:])


def test_a_process_that_is_killed_is_reported(config: Config, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(build_lib, "_work", killed)
    with pytest.raises(UserError, match="killed, as happens when memory runs out"):
        open_corpus(config, shards_of(config, tmp_path, monkeypatch))
    folder = shards_of(config, tmp_path, monkeypatch)
    monkeypatch.setattr(build_lib, "_work", killed_later)
    with pytest.raises(UserError, match="finished shards are kept"):
        open_corpus(config, folder)
    assert list(Path(config.data.cache_dir).glob("*.building/00000.json"))


@pytest.mark.parametrize("content", ["", "[]", "null", '{"x": 1}', "\xff", "WHOLE"])
def test_shards_that_a_crash_left_damaged_are_made_again(config: Config, tmp_path: Path, monkeypatch, content: str):
    """The file with a shard's facts is invalid, or its shard is missing."""
    folder = shards_of(config, tmp_path, monkeypatch)
    whole = open_corpus(config, folder)
    assert whole.folder
    made = json.loads((whole.folder / "manifest.json").read_text())["shards"][0]
    left = tmp_path / "cache2" / f"{whole.folder.name}.building"
    left.mkdir(parents=True)
    (left / "00000.json").write_text(json.dumps(made) if content == "WHOLE" else content)
    assert open_corpus(config, folder, cache_dir=str(tmp_path / "cache2")).fingerprint == whole.fingerprint


def children(pid: int) -> list[int]:
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has ended
            if int(path.read_text().rsplit(")", 1)[1].split()[1]) == pid:
                found.append(int(path.parent.name))
    return found


def spawned(pid: int) -> list[int]:
    """Returns the child processes that are workers of a pool."""
    found = []
    for child in children(pid):
        with contextlib.suppress(OSError):  # it has ended
            if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes():
                found.append(child)
    return found


def hears_no_ctrl_c(pid: int) -> bool:
    status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return bool(int(status["SigBlk"], 16) >> (signal.SIGINT - 1) & 1)


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="finds processes in /proc")
def test_worker_processes_end_with_their_script(config: Config, tmp_path: Path):
    path = write(tmp_path, {f"d/{i}.txt": LINES for i in range(40)}) / "d"
    script = SCRIPT.format(root=str(ROOT), path=str(path), cache=config.data.cache_dir, sleep=0)
    script = script.replace(
        "c = get_config()", "c = get_config()\nfrom jaxlm.data.sources import files\nfiles.UNIT_BYTES = 5 * 10**4"
    )
    file = tmp_path / "script.py"
    file.write_text(script)  # without `if __name__ == "__main__"`, as people write them
    process = subprocess.Popen([sys.executable, str(file)], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 30
    while len(workers := spawned(process.pid)) < 1 and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.01)
    deaf = [hears_no_ctrl_c(pid) for pid in workers]
    process.kill()
    process.communicate()
    assert workers, "they were not there yet, or no longer"
    assert all(deaf), "a terminal sends it to all, and those that are starting would print where they are"
    while any(Path(f"/proc/{pid}").exists() for pid in workers) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not [pid for pid in workers if Path(f"/proc/{pid}").exists()]
