"""Damaged texts, records and datasets are read or refused in one line, and no code in them runs."""

import dataclasses
import io
import json
import lzma
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fsspec.implementations import memory
from hypothesis import strategies as st

from jaxlm.config import Config, UserError
from jaxlm.data import prepare
from jaxlm.data.sources import jsonl as jsonl_source
from jaxlm.data.sources import tfds as tfds_source
from jaxlm.data.sources.documents import Document, Skipped
from jaxlm.data.sources.opening import open_source
from tests.corpora import LINES, open_corpus, write
from tests.data.test_data_records import PACK, jsonl
from tests.fuzzing import RECORDS, changed, damaged, fuzz, fuzz_config


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return fuzz_config(tmp_path)


def read_documents(config: Config) -> None:
    for unit in open_source(config.data).units():
        for item in unit.read():
            assert isinstance(item, Document | Skipped)
            assert not isinstance(item, Document) or "\0" not in item.text


KEYS = [
    {"text_key": "text"},
    {"text_key": "doc.text"},
    {"text_key": "number"},
    {"response_key": "response"},
    {"prompt_key": "prompt", "response_key": "response", "chat_template": "{role}: {content}\n"},
    {"messages_key": "messages", "chat_template": "{role}: {content}\n"},
]
HOW = st.tuples(st.sampled_from(KEYS), st.sampled_from(["stop", "skip"]))


def with_keys(config: Config, source: Any, path: Path | str, how: tuple[dict[str, Any], Any]) -> Config:
    data = dataclasses.replace(config.data, source=source, path=str(path), on_error=how[1], **how[0])
    return dataclasses.replace(config, data=data)


@pytest.mark.parametrize("suffix", PACK)
def test_damaged_json_lines_are_read_or_refused(config: Config, tmp_path: Path, suffix: str):
    pack = PACK[suffix]
    lines = st.lists(changed(RECORDS[:3]), min_size=1, max_size=4).map(b"\n".join) | damaged([jsonl(RECORDS[:4])])
    content = lines.map(pack) | damaged([pack(jsonl(RECORDS))])

    def read(case: tuple[bytes, Any]) -> None:
        path = write(tmp_path, {f"a.jsonl{suffix}": case[0]}) / f"a.jsonl{suffix}"
        read_documents(with_keys(config, "jsonl", path, case[1]))

    fuzz(st.tuples(content, HOW), read, 100)


@pytest.mark.parametrize("suffix", PACK)
def test_damaged_texts_are_read_or_refused(config: Config, tmp_path: Path, suffix: str):
    pack, whole = PACK[suffix], ("naïve 漢字\r\n" + LINES[:2000]).encode()

    def read(content: bytes) -> None:
        path = write(tmp_path, {f"a.txt{suffix}": content}) / f"a.txt{suffix}"
        read_documents(with_keys(config, "text", path, ({}, "stop")))

    fuzz(damaged([whole]).map(pack) | damaged([pack(whole)]), read, 50)


def test_damaged_parquet_is_read_or_refused(config: Config, tmp_path: Path):
    table = pa.Table.from_pylist(RECORDS)
    seeds = []
    ways: list[dict[str, Any]] = [
        {"compression": "none", "use_dictionary": False},
        {"compression": "zstd", "write_page_index": True},
        {"compression": "gzip", "data_page_version": "2.0"},
        {"compression": "none", "store_schema": False, "write_page_checksum": True},
    ]
    for keys in ways:
        file = io.BytesIO()
        pq.write_table(table, file, row_group_size=11, **keys)
        seeds.append(file.getvalue())

    @st.composite
    def cases(draw: Any) -> bytes:
        """Damages the pages, the footer that says where they are, or the whole file."""
        whole = draw(st.sampled_from(seeds))
        cut = len(whole) - 8 - int.from_bytes(whole[-8:-4], "little")
        what = draw(st.sampled_from(["pages", "footer", "all"]))
        if what == "pages":
            return draw(damaged([whole[:cut]]))[:cut].ljust(cut, b"\0") + whole[cut:]
        if what == "footer":
            footer = draw(damaged([whole[cut:-8]]))
            return whole[:cut] + footer + len(footer).to_bytes(4, "little") + b"PAR1"
        return draw(damaged([whole]))

    def read(case: tuple[bytes, Any]) -> None:
        path = write(tmp_path, {"a.parquet": case[0]}) / "a.parquet"
        read_documents(with_keys(config, "parquet", path, case[1]))

    fuzz(st.tuples(cases(), HOW), read, 350)


def test_a_line_that_would_fill_the_memory_is_refused(config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A small compressed file may hold such a line."""
    monkeypatch.setattr(jsonl_source, "MAX_LINE_BYTES", 1 << 20)
    content = PACK[".zst"](jsonl(RECORDS) + jsonl([{"text": "x" * (2 << 20)}]))
    write(tmp_path, {"a.jsonl.zst": content})
    with pytest.raises(UserError, match=r"a\.jsonl\.zst line 31: more than 1 MiB"):
        open_corpus(config, tmp_path / "a.jsonl.zst", source="jsonl")


def test_lines_are_read_from_stores_elsewhere(config: Config, monkeypatch: pytest.MonkeyPatch):
    """The files of some stores, such as s3://, have a `readline` that takes no size limit."""
    fsspec.filesystem("memory").pipe("/lines/a.jsonl", jsonl(RECORDS))
    monkeypatch.setattr(memory.MemoryFile, "readline", lambda file: io.BytesIO.readline(file))
    read_documents(with_keys(config, "jsonl", "memory://lines/a.jsonl", ({}, "stop")))


def test_an_archive_that_requires_too_much_memory_is_refused(config: Config, tmp_path: Path):
    content = bytearray(lzma.compress(LINES.encode(), lzma.FORMAT_ALONE))
    write(tmp_path, {"a.txt.xz": bytes(content)})
    open_corpus(config, tmp_path / "a.txt.xz")
    content[1:5] = b"\xff" * 4  # a dictionary of 4 GiB
    write(tmp_path, {"b.txt.xz": bytes(content)})
    with pytest.raises(UserError, match=r"b\.txt\.xz: unreadable \(Memory usage limit"):
        open_corpus(config, tmp_path / "b.txt.xz")


@pytest.mark.parametrize("name", ["huggingface:lm1b", "kaggle:some/config:1.0.0"])
def test_datasets_that_are_code_are_refused(config: Config, name: str):
    config.data.source, config.data.tfds_name = "tfds", name
    with pytest.raises(UserError, match=rf"data\.tfds_name is '{name}': a dataset with a namespace runs code"):
        prepare(config, progress=False)


def test_features_that_are_code_are_refused(config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A dataset's folder names a module that can be imported."""
    features = {"pythonClassName": "a_module_of_others.Feature", "featuresDict": {"features": {}}}
    info = {"name": "some", "version": "1.0.0", "fileFormat": "tfrecord", "splits": []}
    write(tmp_path, {"a_module_of_others.py": "raise SystemExit", "some/1.0.0/features.json": json.dumps(features),
                     "some/1.0.0/dataset_info.json": json.dumps(info)})  # fmt: skip
    monkeypatch.syspath_prepend(tmp_path)
    config.data.source, config.data.tfds_name, config.data.path = "tfds", "some:1.0.0", str(tmp_path)
    with pytest.raises(UserError, match=r"features\.json requires a_module_of_others\.Feature"):
        prepare(config, progress=False)


def test_a_damaged_dataset_is_refused(config: Config, monkeypatch: pytest.MonkeyPatch):
    def broken() -> Any:
        yield {"text": b"a"}
        raise RuntimeError("{{function_node x}} corrupted record at 176")

    monkeypatch.setattr(tfds_source, "_builder", lambda data: type("Builder", (), {"data_dir": "folder"}))
    monkeypatch.setattr(tfds_source, "_examples", lambda *args: (2, broken))
    with pytest.raises(UserError, match=r"folder: split train is unreadable \(corrupted record at 176\)"):
        list(tfds_source._read(config.data, "train", None, 0, 1))
