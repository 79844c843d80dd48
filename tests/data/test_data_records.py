"""JSON-lines, Parquet and packed files: which records are read, refused, or skipped and counted."""

import bz2
import dataclasses
import gzip
import json
import lzma
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jaxlm.config import Config, UserError
from jaxlm.data import build as build_lib
from jaxlm.data import prepare
from jaxlm.data import store as store_lib
from jaxlm.data.sources import documents as documents_lib
from jaxlm.data.sources import files as files_lib
from jaxlm.data.sources import text as sources_lib
from jaxlm.data.sources.documents import Document
from jaxlm.data.sources.opening import open_source
from tests import corpora
from tests.corpora import LINES, make_config, open_corpus, text, write

RECORDS = [{"id": i, "doc": {"text": f"record {i}: naïve \u2028 漢字\n\n" * 3}} for i in range(60)]


def zst(data: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(data)
    return sink.getvalue().to_pybytes()


PACK = {"": bytes, ".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": zst}


def jsonl(records: list[Any]) -> bytes:
    return "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records).encode()


@pytest.fixture
def config(tmp_path: Path) -> Config:
    config = make_config(tmp_path)
    config.data.text_key, config.data.val_fraction = "doc.text", 0.1
    return config


def documents(config: Config, split: Any) -> list[str]:
    return [d.text for d in corpora.documents(open_source(config.data), split)]


@pytest.mark.parametrize("kind", ["jsonl", *(f"jsonl{p}" for p in PACK if p), "parquet"])
def test_a_record_is_a_document(config: Config, tmp_path: Path, kind: str):
    path = tmp_path / f"a.{kind}"
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(RECORDS), path, row_group_size=7)
    else:
        path.write_bytes(PACK[kind.removeprefix("jsonl")](jsonl(RECORDS)))
    corpus = open_corpus(config, path, source=kind.split(".")[0])
    train, val = documents(config, "train"), documents(config, "val")
    assert len(val) > 1 and sorted(train + val) == sorted(r["doc"]["text"] for r in RECORDS)
    assert text(corpus, "train") == "".join(train) and text(corpus, "val") == "".join(val)
    assert [corpus.facts[s]["documents"] for s in ("train", "val")] == [len(train), len(val)]
    assert corpus.facts["skipped"] == 0


@pytest.mark.parametrize("suffix", PACK)
def test_packed_text_equals_plain_text(config: Config, tmp_path: Path, monkeypatch, suffix: str):
    monkeypatch.setattr(sources_lib, "BLOCK", 1000)
    plain = open_corpus(config, write(tmp_path, {"a.txt": LINES + "é"}) / "a.txt")
    path = tmp_path / f"b.txt{suffix}"
    path.write_bytes(PACK[suffix]((LINES + "é").encode()))
    packed = open_corpus(config, path)
    assert packed.fingerprint == plain.fingerprint and text(packed, "train") + text(packed, "val") == LINES + "é"


@pytest.mark.parametrize("suffix", [p for p in PACK if p])
def test_files_cut_short_are_refused(config: Config, tmp_path: Path, suffix: str):
    data = PACK[suffix](np.random.default_rng(0).integers(97, 123, 300_000, np.uint8).tobytes())
    for name, content in (("half", data[: len(data) // 2]), ("end", data[:-3]), ("no", b"plain text, not packed")):
        path = tmp_path / f"{name}.txt{suffix}"
        path.write_bytes(content)
        with pytest.raises(UserError, match=rf"{name}\.txt\{suffix}: unreadable .*not a whole \{suffix} file"):
            open_corpus(config, path)
    assert not [p for p in Path(config.data.cache_dir).glob("*") if p.is_dir()]


def test_val_path_gives_the_validation_split(config: Config, tmp_path: Path):
    write(
        tmp_path, {"d/a.jsonl": jsonl(RECORDS[:30]), "d/b.jsonl": jsonl(RECORDS[30:50]), "v.jsonl": jsonl(RECORDS[50:])}
    )
    corpus = open_corpus(config, tmp_path / "d", source="jsonl", val_path=str(tmp_path / "v.jsonl"))
    assert text(corpus, "train") == "".join(r["doc"]["text"] for r in RECORDS[:50])
    assert text(corpus, "val") == "".join(r["doc"]["text"] for r in RECORDS[50:])
    with pytest.raises(UserError, match=r"every file is in data\.val_path too"):
        open_corpus(config, tmp_path / "d", val_path=str(tmp_path / "d"))


BAD = {
    b'{"doc": {"txt": "a"}}': r"a\.jsonl line 2: no 'doc\.text' \(data\.text_key\); its keys: \['txt'\]",
    b'{"doc": "a"}': r"line 2: no 'doc\.text' .*none in str",
    b'["doc"]': r"line 2: no 'doc\.text' .*none in list",
    b'{"doc": {"text": 5}}': r"line 2: 'doc\.text' is int; allowed: a text",
    b'{"doc": {"text": ""}}': r"line 2: 'doc\.text' is empty",
    b'{"doc": {"text": "a\\u0000b"}}': r"line 2: 'doc\.text' holds a NUL",
    b'{"doc": {"text": "a"': r"line 2: not JSON \(",
    b'{"doc": {"text": "a\xff"}}': r"line 2: not UTF-8 at byte 19",
    b"[" * 100_000: r"line 2: not JSON",
}


@pytest.mark.parametrize("line", BAD, ids=range(len(BAD)))
def test_bad_records_are_refused_or_skipped_and_counted(config: Config, tmp_path: Path, capsys, line: bytes):
    lines = jsonl(RECORDS).splitlines()
    write(tmp_path, {"a.jsonl": b"\n".join([lines[0], line, b"", *lines[1:]])})
    with pytest.raises(UserError, match=BAD[line]):
        open_corpus(config, tmp_path / "a.jsonl", source="jsonl")
    corpus = open_corpus(config, tmp_path / "a.jsonl", on_error="skip")
    assert corpus.facts["skipped"] == 1
    assert sum(corpus.facts[s]["documents"] for s in ("train", "val")) == len(RECORDS)


@pytest.mark.parametrize("bad", [1, 5, 8])
def test_skipped_records_are_counted_and_the_first_five_named(config: Config, tmp_path: Path, capsys, bad: int):
    write(tmp_path, {"a.jsonl": jsonl([*RECORDS, *[{"no": "text"}] * bad])})
    config.data.path, config.data.source, config.data.on_error = str(tmp_path / "a.jsonl"), "jsonl", "skip"
    prepare(config)
    first, *named = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("tokenizing")]
    what = "file or record" if bad == 1 else "files or records"
    assert first == f"skipped {bad} unusable {what}"
    assert len(named) == {1: 1, 5: 5, 8: 6}[bad] and all("'doc.text'" in line for line in named[:5])
    assert named[5:] == ["  ... and 3 more"] * (bad == 8)


def test_bad_parquet_is_refused_or_skipped(config: Config, tmp_path: Path):
    pq.write_table(
        pa.Table.from_pylist([*RECORDS[:3], {"id": 3, "doc": {"text": None}}, *RECORDS[3:]]), tmp_path / "a.parquet"
    )
    with pytest.raises(UserError, match=r"a\.parquet row 4: 'doc\.text' is NoneType"):
        open_corpus(config, tmp_path / "a.parquet", source="parquet")
    assert open_corpus(config, tmp_path / "a.parquet", on_error="skip").facts["skipped"] == 1
    with pytest.raises(UserError, match=r"data\.text_key is 'body'; allowed with .*a\.parquet: id, doc"):
        open_corpus(config, tmp_path / "a.parquet", text_key="body")
    data = (tmp_path / "a.parquet").read_bytes()
    write(tmp_path, {"b.parquet": data[:-100], "c.parquet": b"no parquet"})
    for name in "bc":
        with pytest.raises(UserError, match=rf"{name}\.parquet: unreadable as Parquet"):
            open_corpus(config, tmp_path / f"{name}.parquet", text_key="doc.text", on_error="stop")


def test_a_long_record_is_tokenized_in_parts(config: Config, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(documents_lib, "BLOCK", 100)
    long = "x" * 450 + "\n" + LINES[:500]
    write(tmp_path, {"a.jsonl": jsonl([*RECORDS, {"doc": {"text": long}}])})
    corpus = open_corpus(config, tmp_path / "a.jsonl", source="jsonl")
    assert long in text(corpus, "train") + text(corpus, "val")
    assert sum(corpus.facts[s]["documents"] for s in ("train", "val")) == len(RECORDS) + 1


def in_memory(name: str, files: dict[str, bytes]) -> str:
    """Writes files to fsspec's store in memory, and returns their address."""
    store = fsspec.filesystem("memory")
    for path, content in files.items():
        store.pipe(f"/{name}/{path}", content)
    return f"memory://{name}"


def test_addresses_are_read_like_local_paths(config: Config, tmp_path: Path):
    """A path names the same documents in another file system."""
    files = {
        "d/a.jsonl": jsonl(RECORDS[:30]),
        "d/sub/b.jsonl.gz": gzip.compress(jsonl(RECORDS[30:])),
        "c.txt": b"other",
    }
    address = in_memory("addresses", files)
    write(tmp_path, files)
    for path in ("d", "d/a.jsonl", "d/*.jsonl", "d/**/*.gz"):
        here = open_corpus(config, tmp_path / path, source="jsonl")
        there = open_corpus(config, f"{address}/{path}")
        assert there.fingerprint == here.fingerprint and text(there, "train"), path
        assert there.folder != here.folder
    before = open_corpus(config, f"{address}/d").folder
    in_memory("addresses", {"d/a.jsonl": jsonl(RECORDS[30:])})
    assert open_corpus(config, f"{address}/d").folder != before
    table = tmp_path / "t.parquet"
    pq.write_table(pa.Table.from_pylist(RECORDS), table)
    address = in_memory("parquet", {"t.parquet": table.read_bytes()})
    there = open_corpus(config, f"{address}/t.parquet", source="parquet")
    assert sum(there.facts[s]["documents"] for s in ("train", "val")) == len(RECORDS)


def test_worker_processes_read_addresses(config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(files_lib, "UNIT_BYTES", 2000)
    write(tmp_path, {"a.jsonl": jsonl(RECORDS)})
    here = open_corpus(config, tmp_path / "a.jsonl", source="jsonl")
    there = open_corpus(config, f"file://{tmp_path}/a.jsonl")
    assert len(here.train.shards) > 2 and there.fingerprint == here.fingerprint


@pytest.mark.parametrize(
    "address, words",
    [
        ("nope://a/b", r"data\.path is 'nope://a/b': Unsupported filesystem.*allowed: a path, or an address"),
        ("s3://a/b", r"data\.path is 's3://a/b': Install s3fs"),
        ("memory://nothing/there", r"data\.path is 'memory://nothing/there': no such file or folder"),
    ],
)
def test_unusable_addresses_are_refused(config: Config, address: str, words: str):
    with pytest.raises(UserError, match=words):
        open_corpus(config, address, source="jsonl")


def test_token_files_at_an_address_are_refused(config: Config):
    address = in_memory("ids", {"a.bin": bytes(2000)})
    with pytest.raises(UserError, match=r"a\.bin: not on this machine; allowed .*files of this machine"):
        open_corpus(config, f"{address}/a.bin", source="tokens")


def test_units_cut_at_any_byte_hold_each_record_once(config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The tokens are the same as with one unit, and errors name the line of the file."""
    path = write(tmp_path, {"a.jsonl": jsonl(RECORDS)}) / "a.jsonl"
    monkeypatch.setattr(build_lib, "num_processes", lambda: 1)
    whole = open_corpus(config, path, source="jsonl")
    for size in (137, 400, 1000):
        monkeypatch.setattr(files_lib, "UNIT_BYTES", size)
        monkeypatch.setattr(store_lib, "SHAPE", [size])
        parts = open_corpus(config, path)
        for split in ("train", "val"):
            np.testing.assert_array_equal(getattr(parts, split), getattr(whole, split))
        assert len(open_source(config.data).units()) > 5
    lines = jsonl(RECORDS).splitlines(keepends=True)
    write(tmp_path, {"a.jsonl": b"\n".join([b"", *lines[:50], b"{}\n", *lines[50:]])})  # blank lines between
    with pytest.raises(UserError, match=r"a\.jsonl line 102: no 'doc\.text'"):
        open_corpus(config, path)


def test_a_long_line_is_read_in_parts(config: Config, tmp_path: Path):
    """A record of 20 MB is one document, in three parts."""
    long = "word after word " * 1_300_000
    path = write(tmp_path, {"a.jsonl": jsonl([*RECORDS, {"doc": {"text": long}}])}) / "a.jsonl"
    config.data.source, config.data.path = "jsonl", str(path)
    units = open_source(config.data).units()
    found = [d for unit in units for d in unit.read() if isinstance(d, Document)]
    assert "".join(d.text for d in found[60:]) == long and [d.first for d in found[60:]] == [True, False, False]


@pytest.mark.parametrize("suffix", [".xz", ".bz2"])
def test_concatenated_streams_are_all_read(config: Config, tmp_path: Path, suffix: str):
    """Parallel packers write such files. A later stream that is damaged is refused, and not taken for the end."""
    pack = PACK[suffix]
    first, second = pack(jsonl(RECORDS[:30])), pack(jsonl(RECORDS[30:]))
    padding = bytes(3 << 20) if suffix == ".xz" else b""  # more than is read at once
    whole = write(tmp_path, {f"a.jsonl{suffix}": first + padding + second + padding}) / f"a.jsonl{suffix}"
    corpus = open_corpus(config, whole, source="jsonl")
    assert sum(corpus.facts[s]["documents"] for s in ("train", "val")) == len(RECORDS)
    for name, content in (("header", first + b"\xff" + second[1:]), ("rubbish", first + second + b"rubbish")):
        path = write(tmp_path, {f"{name}.jsonl{suffix}": content}) / f"{name}.jsonl{suffix}"
        with pytest.raises(UserError, match=rf"{name}\.jsonl\{suffix}: unreadable"):
            open_corpus(config, path)


def test_links_add_no_documents(config: Config, tmp_path: Path):
    write(tmp_path, {f"d/{i}.txt": f"document {i} " * 9 for i in range(40)})
    for i in range(40):
        (tmp_path / f"d/z{i}.txt").symlink_to(tmp_path / f"d/{i}.txt")
    (tmp_path / "d/x").symlink_to(tmp_path / "d")
    (tmp_path / "d/y").symlink_to(tmp_path / "d")
    for path in ("d", "d/**/*.txt"):
        corpus = open_corpus(config, tmp_path / path, source="text", val_fraction=0.2)
        assert sum(corpus.facts[s]["documents"] for s in ("train", "val")) == 40


def test_a_damaged_file_is_skipped_from_the_damage_on(config: Config, tmp_path: Path):
    packed = gzip.compress(jsonl(RECORDS) * 50)
    write(tmp_path, {"d/a.jsonl": jsonl(RECORDS), "d/b.jsonl.gz": packed[: len(packed) // 2], "p/b.parquet": b"PAR1"})
    pq.write_table(pa.Table.from_pylist(RECORDS), tmp_path / "p/a.parquet")
    with pytest.raises(UserError, match=r"b\.parquet: unreadable as Parquet"):
        open_corpus(config, tmp_path / "p", source="parquet")
    corpus = open_corpus(config, tmp_path / "p", on_error="skip")
    assert [corpus.facts["skipped"], sum(corpus.facts[s]["documents"] for s in ("train", "val"))] == [1, len(RECORDS)]
    config.data.on_error = "stop"
    with pytest.raises(UserError, match=r"b\.jsonl\.gz: unreadable"):
        open_corpus(config, tmp_path / "d", source="jsonl")
    corpus = open_corpus(config, tmp_path / "d", on_error="skip")
    assert corpus.facts["skipped"] >= 1
    assert sum(corpus.facts[s]["documents"] for s in ("train", "val")) >= len(RECORDS)


def test_files_that_change_while_they_are_read_are_refused(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    path = write(tmp_path, {"a.jsonl": jsonl(RECORDS)}) / "a.jsonl"
    make = store_lib.make_shards

    def late(*args: Any) -> Any:
        write(tmp_path, {"a.jsonl": jsonl(RECORDS[::-1])})
        return make(*args)

    monkeypatch.setattr(store_lib, "make_shards", late)
    with pytest.raises(UserError, match="files changed while they were read"):
        open_corpus(config, path, source="jsonl")
    assert not [p for p in Path(config.data.cache_dir).glob("*") if p.is_dir()]


def test_keys_with_dots_and_byte_order_marks_are_read(config: Config, tmp_path: Path):
    records = [{"a.b": f"text {i} " * 9} for i in range(40)]
    path = write(tmp_path, {"a.jsonl": b"\xef\xbb\xbf" + jsonl(records)}) / "a.jsonl"
    pq.write_table(pa.Table.from_pylist(records), tmp_path / "a.parquet")
    for source in ("jsonl", "parquet"):
        corpus = open_corpus(config, path.with_suffix(f".{source}"), source=source, text_key="a.b")
        assert sum(corpus.facts[s]["documents"] for s in ("train", "val")) == 40


KEYS = {"text_key": "t", "on_error": "skip", "val_fraction": 0.2, "messages_key": "m", "response_key": "r"}


def test_every_setting_that_shapes_records_is_in_their_key(config: Config, tmp_path: Path):
    config.data.source, config.data.path = "jsonl", str(write(tmp_path, {"a.jsonl": jsonl(RECORDS)}) / "a.jsonl")
    found = [open_source(config.data).key]
    for key, value in KEYS.items():
        found.append(open_source(dataclasses.replace(config.data, **{key: value})).key)
    for keys in ({"messages_key": "m"}, {"response_key": "r"}, {"response_key": "r", "prompt_key": "p"}):
        found.append(open_source(dataclasses.replace(config.data, chat_template="{role}:{content}", **keys)).key)
    assert len({json.dumps(key) for key in found}) == len(found)
