"""Damaged stores and files of token ids are read or refused in one line, and no code in them runs."""

import dataclasses
import hashlib
import io
import json
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import strategies as st

from configs.base import get_config
from jaxlm.config import Config, UserError
from jaxlm.data import prepare
from jaxlm.data.order import TrainOrder, make_order
from tests.configurations import ROOT
from tests.corpora import open_corpus, write
from tests.data.test_data_records import jsonl
from tests.fuzzing import RECORDS, changed, damaged, fuzz, fuzz_config


def read_batches(config: Config) -> None:
    corpus = prepare(config, progress=False)
    assert type(corpus.vocab_size) is int
    for packing in ("concat", "document")[: 1 + (corpus.train.starts is not None and corpus.val.starts is not None)]:
        own = dataclasses.replace(config, data=dataclasses.replace(config.data, packing=packing))
        for rows in (TrainOrder(corpus, own).batches(0, 3), make_order(corpus.val, own).eval_rows(np.arange(2))):
            assert rows["inputs"].min() >= 0 and rows["inputs"].max() < corpus.vocab_size
            assert rows["targets"].min() >= -1 and rows["targets"].max() < corpus.vocab_size
    if corpus.tokenizer:
        corpus.tokenizer.decode(np.asarray(corpus.train)[:99])


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return fuzz_config(tmp_path)


@pytest.fixture
def store(config: Config, tmp_path: Path) -> Path:
    """Makes a store with masks, and lets `config` name only the folder of a store, as if that were all a user has."""
    config.data.messages_key, config.data.chat_template = "messages", "{role}: {content}\n"
    path = write(tmp_path, {"a.jsonl": jsonl(RECORDS)}) / "a.jsonl"
    folder = open_corpus(config, path, source="jsonl", tokenizer="chars").folder
    assert folder
    config.data = dataclasses.replace(get_config().data, source="tokens", path=str(tmp_path / "store"))
    return folder


def sign(folder: Path) -> None:
    """Writes the current hashes of the files into the manifest."""
    manifest = json.loads((folder / "manifest.json").read_text())
    for index, shard in enumerate(manifest["shards"]):
        for split in ("train", "val"):
            for suffix in shard[split]["sha256"]:
                content = (folder / split / f"{index:05}.{suffix}").read_bytes()
                shard[split]["sha256"][suffix] = hashlib.sha256(content).hexdigest()
    (folder / "manifest.json").write_text(json.dumps(manifest))


def test_damaged_stores_are_read_or_refused(config: Config, store: Path, tmp_path: Path):
    whole = {path.relative_to(store).as_posix(): path.read_bytes() for path in store.rglob("*") if path.is_file()}
    assert len(whole) == 8
    folder = write(tmp_path / "store", whole)
    read_batches(config)
    trees = ("manifest.json", "tokenizer/jaxlm_tokenizer.json")
    damage = st.one_of(
        *(st.tuples(st.just(name), changed([json.loads(whole[name])]), st.just(False)) for name in trees),
        *(st.tuples(st.just(name), damaged([whole[name]]), st.booleans()) for name in sorted(whole)),
    )

    def read(case: tuple[str, bytes, bool]) -> None:
        name, content, signed = case
        signed = signed and name not in trees
        if signed:  # with the length in the manifest
            content = content[: len(whole[name])].ljust(len(whole[name]), b"\0")
        write(folder, {name: content})
        try:
            if signed:
                sign(folder)
            read_batches(config)
        finally:
            write(folder, {other: whole[other] for other in (name, "manifest.json")})

    fuzz(damage, read, 250)


STORES = {
    "another suffix": (lambda m: m["shards"][0]["train"]["sha256"].update({"../../x": ""}), "is not a shard"),
    "no files": (lambda m: m["shards"][0]["train"].update(sha256={}), "is not a shard"),
    "a list of files": (lambda m: m["shards"][0]["train"].update(sha256=[]), "not the manifest"),
    "masks for some": (lambda m: m["shards"][0]["val"]["sha256"].pop("mask"), "is not a shard"),
    "fewer than none": (lambda m: m["shards"][0]["val"].update(bytes=-1), "is not a shard"),
    "a float": (lambda m: m.update(vocab_size=float(m["vocab_size"])), "vocab_size"),
}


@pytest.mark.parametrize("change, said", STORES.values(), ids=STORES.keys())
def test_wrong_manifests_are_refused(config: Config, store: Path, change: Callable[[dict], object], said: str):
    manifest = json.loads((store / "manifest.json").read_text())
    change(manifest)
    (store / "manifest.json").write_text(json.dumps(manifest))
    config.data.path = str(store)
    with pytest.raises(UserError, match=said):
        read_batches(config)


@pytest.mark.parametrize(
    "name, at, value, said",
    [
        ("bin", 8, b"\xff\xff", r"00000\.bin: id 65535; allowed: 0 to"),
        ("starts", 0, b"\1", r"\.starts files hold invalid document starts"),
        ("starts", 8, b"\0", r"\.starts files hold invalid document starts"),
        ("starts", 23, b"\x80", r"\.starts files hold invalid document starts"),
        ("starts", -8, b"\xff" * 7, r"\.starts files hold invalid document starts"),
    ],
)
def test_wrong_stores_with_matching_hashes_are_refused(
    config: Config, store: Path, name: str, at: int, value: bytes, said: str
):
    path = store / f"train/00000.{name}"
    content = bytearray(path.read_bytes())
    at %= len(content)
    content[at : at + len(value)] = value
    path.write_bytes(content)
    sign(store)
    config.data.path = str(store)
    with pytest.raises(UserError, match=said):
        read_batches(config)


def npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array, allow_pickle=True)
    return file.getvalue()


def llmc(magic: int, version: int, ids: np.ndarray) -> bytes:
    return np.array([magic, version, len(ids), *[0] * 253], "<i4").tobytes() + ids.tobytes()


IDS = np.arange(600) % 50
SHAPES = ("600L", "-1", "10**5", "1e3", "9" * 40, "600, 0", "")
KINDS = ("'O'", "[('a', '<u2')]", "'<u2,<u2'", "('<u2', (2,))", "{'a': 1}", "'<M8[ns]'", "b'u2'", "[]")
HEADERS = [
    *(f"{{'descr': '<u2', 'fortran_order': False, 'shape': ({shape},), }}" for shape in SHAPES),
    *(f"{{'descr': {kind}, 'fortran_order': False, 'shape': (600,), }}" for kind in KINDS),
    "(" * 9000,
    "-" * 9000 + "1",
    "{[]: 1}",
    "{**1}",
    "__import__('os').abort()",
    "'\\N{x}'",
    "0777",
    "\n\\\n",
]


def test_damaged_token_files_are_read_or_refused(config: Config, tmp_path: Path):
    config.data.source, config.data.vocab_size = "tokens", 50
    bins = [IDS.astype("<u2").tobytes(), llmc(20240520, 1, IDS.astype("<u2")), llmc(20240801, 7, IDS.astype("<u4"))]
    npys = [npy(IDS.astype(kind)) for kind in ("u1", "<u2", ">u4", "<i8", "<f4", "O")]
    versions = st.sampled_from([b"\1\0", b"\2\0", b"\3\0", b"\x09\0"])
    headers = st.tuples(versions, st.sampled_from(HEADERS)).map(
        lambda drawn: (
            b"\x93NUMPY"
            + drawn[0]
            + len(drawn[1]).to_bytes(2 if drawn[0] == b"\1\0" else 4, "little")
            + drawn[1].encode()
            + bytes(1200)
        )
    )
    cases = st.tuples(st.just("a.bin"), damaged(bins)) | st.tuples(st.just("a.npy"), damaged(npys) | headers)

    def read(case: tuple[str, bytes]) -> None:
        name, content = case
        config.data.path = str(write(tmp_path, {name: content}) / name)
        read_batches(config)

    fuzz(cases, read, 300)


class Ran(Exception):
    pass


class Code:
    def __reduce__(self) -> Any:
        return _run, ()


def _run() -> None:
    raise Ran


def test_nothing_is_unpickled(config: Config, tmp_path: Path):
    archive = io.BytesIO()
    np.savez(archive, ids=IDS)
    contents = {
        "pickle": pickle.dumps(Code()),
        "objects": npy(np.array([Code()] * 600)),
        "renamed": npy(np.array([Code()] * 600)).replace(b"'|O'", b"'<Q'"),
        "archive": archive.getvalue(),
    }
    with pytest.raises(Ran):
        np.load(io.BytesIO(contents["objects"]), allow_pickle=True)
    config.data.vocab_size = 50
    for name, content in contents.items():
        write(tmp_path, {f"{name}.npy": content})
        with pytest.raises(UserError, match=rf"{name}\.npy: (unreadable|id \d+)"):
            open_corpus(config, tmp_path / f"{name}.npy", source="tokens")


def test_no_line_of_jaxlm_runs_what_it_reads():
    """Only `--config FILE` runs, because it is code. Discuss any other line that matches the pattern first."""
    runs = re.compile(
        r"(?<![\w.])(eval|exec)\(|\b(pickle|cloudpickle|dill|marshal|shelve|joblib|yaml)\.|\b(np|numpy|torch)\.load\("
        r"|allow_pickle|extractall|unpack_archive|exec_module|runpy"
    )
    lines = [
        f"{path.name}: {line.strip()}"
        for folder in ("jaxlm", "tools")
        for path in (ROOT / folder).rglob("*.py")
        for line in path.read_text("utf-8").splitlines()
        if runs.search(line)
    ]
    # The configuration that a user names is code; chaos_child runs the trainer.
    ours = ["chaos_child.py: import runpy", 'chaos_child.py: runpy.run_module("jaxlm.main", run_name="__main__")']
    assert sorted(lines) == [*ours, "files.py: spec.loader.exec_module(module)"]
