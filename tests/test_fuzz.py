"""What is read is damaged in every way: it is read, or refused in one line; it never crashes, hangs or runs code."""

import copy
import dataclasses
import hashlib
import io
import json
import lzma
import pickle
import re
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fsspec.implementations import memory
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from configs.base import get_config
from jaxlm import cli
from jaxlm.config import Config, UserError, flatten, key_types
from jaxlm.data import load_tokenizer, prepare, records, tfds_source
from jaxlm.data.documents import Document, Skipped
from jaxlm.data.order import TrainOrder, make_order
from jaxlm.data.sentencepiece_tokenizer import SentencePieceTokenizer, train_sentencepiece
from jaxlm.data.sources import open_source
from jaxlm.data.tokenizer_base import Tokenizer
from jaxlm.validate import validate
from tests.configurations import BASE, ROOT, refusal
from tests.corpora import LINES, make_config, open_corpus, write
from tests.test_data_records import PACK, jsonl
from tests.tokenizing import CODE, HF_KINDS

RECORDS = [
    {"text": f"text {i} 漢字", "doc": {"text": "a"}, "prompt": "p", "response": f"answer {i}", "number": i,
     "messages": [{"role": "user", "content": f"question {i}"}, {"role": "assistant", "content": f"answer {i}"}]}
    for i in range(30)
]  # fmt: skip


def fuzz(cases: st.SearchStrategy[Any], read: Callable[[Any], object], max_examples: int) -> None:
    """Each case is read, or refused by a UserError; of all, some are the one and some the other."""
    seen = Counter()

    @settings(max_examples=max_examples, deadline=None, derandomize=True, database=None,
              suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])  # fmt: skip
    @given(cases)
    def check(case: Any) -> None:
        try:
            read(case)
            seen["read"] += 1
        except UserError as error:
            assert str(error).split(), "nothing is said"
            seen["refused"] += 1

    check()
    assert seen["read"] and seen["refused"]


# Damage


@st.composite
def damaged(draw: Any, seeds: list[bytes]) -> bytes:
    """Bits flipped, bytes written over, left out, put in, repeated or moved, the end cut off; or arbitrary bytes."""
    data = bytearray(draw(st.sampled_from(seeds)))
    at = st.integers(0, 63) | st.integers(0, max(len(data), 1))
    for _ in range(draw(st.sampled_from([1, 1, 1, 2, 4]))):
        i, j, n = draw(at), draw(at), draw(st.sampled_from([1, 2, 4, 8, 64]))
        how = draw(st.sampled_from(["flip", "fill", "remove", "insert", "repeat", "move", "end", "any"]))
        if how == "flip" and i < len(data):
            data[i] ^= 1 << (j % 8)
        elif how == "fill":
            data[i : i + n] = bytes([draw(st.sampled_from([0, 1, 0x7F, 0x80, 0xFF]))]) * len(data[i : i + n])
        elif how == "remove":
            del data[i : i + n]
        elif how == "insert":
            data[i:i] = draw(st.binary(min_size=1, max_size=8))
        elif how == "repeat":
            data[i:i] = data[j : j + n]
        elif how == "move":
            data[i : i + n] = data[j : j + n]
        elif how == "end":
            del data[i:]
        elif how == "any" and draw(st.integers(0, 4)) == 0:
            data = bytearray(draw(st.binary(max_size=300)))
    return bytes(data)


DEEP, LONG = "of any depth", "of many digits"  # stand for what json.dumps does not write
ATOMS = st.sampled_from([
    None, True, False, 0, -1, 1, 2, 257, 2**31, 2**32 - 1, 2**63, 2**64, -(2**63), 10**400, 0.5, -0.0, 257.0, 1e308,
    float("nan"), float("inf"), "", "a", "\0", "\ud800", "\n", "../../x", "/etc/passwd", "x" * 500, DEEP, LONG, [], {},
    "BPE", "Unigram", "WordPiece", "Sequence", "Split", "Metaspace", "ByteLevel", "bytes", "chars", "sentencepiece",
    "hf",
])  # fmt: skip
VALUES = ATOMS | st.text(max_size=5) | st.integers() | st.lists(ATOMS, max_size=3) | st.dictionaries(st.text(), ATOMS)


@st.composite
def changed(draw: Any, trees: list[Any]) -> bytes:
    """JSON with values replaced by others of any type, or by one another, and keys left out, renamed or put in."""
    tree = {"": copy.deepcopy(draw(st.sampled_from(trees)))}
    for _ in range(draw(st.sampled_from([1, 1, 2, 3]))):
        places = [(tree, "")]
        while draw(st.integers(0, 5)) and (inside := _items(places[-1][0][places[-1][1]])):
            places.append((places[-1][0][places[-1][1]], draw(st.sampled_from(inside))))
        holder, key = places[-1]
        how = draw(st.sampled_from(["replace", "replace", "remove", "copy", "repeat", "rename", "number"]))
        if how == "remove" and len(places) > 1:
            del holder[key]
        elif how == "copy":
            source, name = draw(st.sampled_from(places))
            holder[key] = copy.deepcopy(source[name])
        elif how == "repeat" and isinstance(holder, list):
            holder.append(copy.deepcopy(holder[key]))
        elif how == "rename" and isinstance(holder, dict) and len(places) > 1:
            holder[draw(st.text(max_size=3))] = holder.pop(key)
        elif how == "number" and type(holder[key]) is int:
            holder[key] = draw(
                st.sampled_from([-holder[key], holder[key] + 1, holder[key] * 10**9, float(holder[key])])
            )
        else:
            holder[key] = draw(VALUES)
    text = json.dumps(tree[""])
    return text.replace(f'"{DEEP}"', "[" * 9999 + "]" * 9999).replace(f'"{LONG}"', "9" * 5000).encode()


def _items(value: Any) -> list[Any]:
    """Keys of an object, or some places of a list."""
    if isinstance(value, list):
        return sorted({0, 1, 2, len(value) // 2, len(value) - 1} & set(range(len(value))))
    return [key for key in value if key] if isinstance(value, dict) else []


# Token ids


def read_batches(config: Config) -> None:
    corpus = prepare(config, progress=False)
    assert type(corpus.vocab_size) is int
    for packing in ("concat", "document")[: 1 + (corpus.train.starts is not None and corpus.val.starts is not None)]:
        own = dataclasses.replace(config, data=dataclasses.replace(config.data, packing=packing))
        for rows in (TrainOrder(corpus, own).batches(0, 3), make_order(corpus.val, own).in_order(0, 2)):
            assert rows["inputs"].min() >= 0 and rows["inputs"].max() < corpus.vocab_size
            assert rows["targets"].min() >= -1 and rows["targets"].max() < corpus.vocab_size
    if corpus.tokenizer:
        corpus.tokenizer.decode(np.asarray(corpus.train)[:99])


@pytest.fixture
def config(tmp_path: Path) -> Config:
    config = make_config(tmp_path)
    config.data.val_fraction, config.batch_size = 0.2, 4
    return config


@pytest.fixture
def store(config: Config, tmp_path: Path) -> Path:
    """With masks; its configuration then is that of one who was given the folder alone."""
    config.data.messages_key, config.data.chat_template = "messages", "{role}: {content}\n"
    path = write(tmp_path, {"a.jsonl": jsonl(RECORDS)}) / "a.jsonl"
    folder = open_corpus(config, path, source="jsonl", tokenizer="chars").folder
    assert folder
    config.data = dataclasses.replace(get_config().data, source="tokens", path=str(tmp_path / "store"))
    return folder


def sign(folder: Path) -> None:
    """Makes the manifest say that its files are as they should be."""
    manifest = json.loads((folder / "manifest.json").read_text())
    for index, shard in enumerate(manifest["shards"]):
        for split in ("train", "val"):
            for suffix in shard[split]["sha256"]:
                content = (folder / split / f"{index:05}.{suffix}").read_bytes()
                shard[split]["sha256"][suffix] = hashlib.sha256(content).hexdigest()
    (folder / "manifest.json").write_text(json.dumps(manifest))


def test_stores(config: Config, store: Path, tmp_path: Path):
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
        if signed:  # of the length that the manifest says
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
    "another suffix": (lambda m: m["shards"][0]["train"]["sha256"].update({"../../x": ""}), "is no shard"),
    "no files": (lambda m: m["shards"][0]["train"].update(sha256={}), "is no shard"),
    "a list of files": (lambda m: m["shards"][0]["train"].update(sha256=[]), "not the manifest"),
    "masks for some": (lambda m: m["shards"][0]["val"]["sha256"].pop("mask"), "is no shard"),
    "fewer than none": (lambda m: m["shards"][0]["val"].update(bytes=-1), "is no shard"),
    "a float": (lambda m: m.update(vocab_size=float(m["vocab_size"])), "vocab_size"),
}


@pytest.mark.parametrize("change, said", STORES.values(), ids=STORES.keys())
def test_manifests(config: Config, store: Path, change: Callable[[dict], object], said: str):
    manifest = json.loads((store / "manifest.json").read_text())
    change(manifest)
    (store / "manifest.json").write_text(json.dumps(manifest))
    config.data.path = str(store)
    with pytest.raises(UserError, match=said):
        read_batches(config)


@pytest.mark.parametrize("name, at, value, said", [
    ("bin", 8, b"\xff\xff", r"00000\.bin: id 65535; allowed: 0 to"),
    ("starts", 0, b"\1", r"\.starts are not where documents start"),
    ("starts", 8, b"\0", r"\.starts are not where documents start"),
    ("starts", 23, b"\x80", r"\.starts are not where documents start"),
    ("starts", -8, b"\xff" * 7, r"\.starts are not where documents start"),
])  # fmt: skip
def test_stores_whose_manifest_says_that_they_are_right(
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
    "(" * 9000, "-" * 9000 + "1", "{[]: 1}", "{**1}", "__import__('os').abort()", "'\\N{x}'", "0777", "\n\\\n",
]  # fmt: skip


def test_token_files(config: Config, tmp_path: Path):
    config.data.source, config.data.vocab_size = "tokens", 50
    bins = [IDS.astype("<u2").tobytes(), llmc(20240520, 1, IDS.astype("<u2")), llmc(20240801, 7, IDS.astype("<u4"))]
    npys = [npy(IDS.astype(kind)) for kind in ("u1", "<u2", ">u4", "<i8", "<f4", "O")]
    versions = st.sampled_from([b"\1\0", b"\2\0", b"\3\0", b"\x09\0"])
    headers = st.tuples(versions, st.sampled_from(HEADERS)).map(
        lambda drawn: b"\x93NUMPY" + drawn[0] + len(drawn[1]).to_bytes(2 if drawn[0] == b"\1\0" else 4, "little")
        + drawn[1].encode() + bytes(1200)
    )  # fmt: skip
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


def test_no_line_of_ours_runs_what_it_reads():
    """But for `--config FILE`, which is code. A pattern, so that a line that would is talked about first."""
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
    assert sorted(lines) == [*ours, "cli.py: spec.loader.exec_module(module)"]


# Texts and records


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
def test_json_lines(config: Config, tmp_path: Path, suffix: str):
    pack = PACK[suffix]
    lines = st.lists(changed(RECORDS[:3]), min_size=1, max_size=4).map(b"\n".join) | damaged([jsonl(RECORDS[:4])])
    content = lines.map(pack) | damaged([pack(jsonl(RECORDS))])

    def read(case: tuple[bytes, Any]) -> None:
        path = write(tmp_path, {f"a.jsonl{suffix}": case[0]}) / f"a.jsonl{suffix}"
        read_documents(with_keys(config, "jsonl", path, case[1]))

    fuzz(st.tuples(content, HOW), read, 100)


@pytest.mark.parametrize("suffix", PACK)
def test_texts(config: Config, tmp_path: Path, suffix: str):
    pack, whole = PACK[suffix], ("naïve 漢字\r\n" + LINES[:2000]).encode()

    def read(content: bytes) -> None:
        path = write(tmp_path, {f"a.txt{suffix}": content}) / f"a.txt{suffix}"
        read_documents(with_keys(config, "text", path, ({}, "stop")))

    fuzz(damaged([whole]).map(pack) | damaged([pack(whole)]), read, 50)


def test_parquet(config: Config, tmp_path: Path):
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
        """The pages, the footer that says where they are, or all of it."""
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


def test_a_line_that_fills_the_memory(config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """As a small packed file may hold."""
    monkeypatch.setattr(records, "MAX_LINE_BYTES", 1 << 20)
    content = PACK[".zst"](jsonl(RECORDS) + jsonl([{"text": "x" * (2 << 20)}]))
    write(tmp_path, {"a.jsonl.zst": content})
    with pytest.raises(UserError, match=r"a\.jsonl\.zst line 31: more than 1 MiB"):
        open_corpus(config, tmp_path / "a.jsonl.zst", source="jsonl")


def test_lines_of_a_store_elsewhere(config: Config, monkeypatch: pytest.MonkeyPatch):
    """Whose files, as those of s3://, read a line without being told how much of it."""
    fsspec.filesystem("memory").pipe("/lines/a.jsonl", jsonl(RECORDS))
    monkeypatch.setattr(memory.MemoryFile, "readline", lambda file: io.BytesIO.readline(file))
    read_documents(with_keys(config, "jsonl", "memory://lines/a.jsonl", ({}, "stop")))


def test_an_archive_that_asks_for_the_memory(config: Config, tmp_path: Path):
    content = bytearray(lzma.compress(LINES.encode(), lzma.FORMAT_ALONE))
    write(tmp_path, {"a.txt.xz": bytes(content)})
    open_corpus(config, tmp_path / "a.txt.xz")
    content[1:5] = b"\xff" * 4  # of 4 GiB, in which earlier text is looked up
    write(tmp_path, {"b.txt.xz": bytes(content)})
    with pytest.raises(UserError, match=r"b\.txt\.xz: unreadable \(Memory usage limit"):
        open_corpus(config, tmp_path / "b.txt.xz")


# Tokenizers


TEXTS = ["def f(x):\n    return x\n", "naïve \u2581 漢字\r\n\t", "", " a  b", "<s>self.<0x41>", LINES[:300]]


def use(tokenizer: Tokenizer) -> None:
    tokenizer.num_threads = 1
    assert 0 <= tokenizer.bos_id < tokenizer.vocab_size == len(tokenizer.bytes_per_token())
    for text in TEXTS:
        (ids,) = tokenizer.encode([text])
        assert ids.dtype == np.int32 and (not ids.size or 0 <= ids.min() <= ids.max() < tokenizer.vocab_size)
        tokenizer.decode(ids)


@pytest.fixture(scope="module")
def model() -> bytes:
    return train_sentencepiece([CODE[:20_000]], 320)


def test_sentencepiece_models(model: bytes, tmp_path: Path):
    """As a user names one, and in the folder of a run, which says that it loses nothing."""
    write(tmp_path, {"own/jaxlm_tokenizer.json": '{"kind": "sentencepiece", "lossless": true}'})

    def read(content: bytes) -> None:
        write(tmp_path, {"a.model": content, "own/sentencepiece.model": content})
        use(load_tokenizer(tmp_path / "own"))
        use(load_tokenizer(tmp_path / "a.model"))

    fuzz(damaged([model]), read, 200)


def test_pieces_that_are_no_text(model: bytes):
    assert b"\x0a\x06return" not in model and model.count(b"self") > 1
    with pytest.raises(UserError, match=r"a\.model: not a sentencepiece model"):
        SentencePieceTokenizer(model.replace(b"self", b"se\xff\xfe", 1), lossless=True, name="a.model")


def test_tokenizer_folders(tmp_path: Path):
    chars = {"kind": "chars", "alphabet": sorted(set("".join(TEXTS) + "\ud800"))}
    specs = [{"kind": "bytes"}, chars, chars, {"kind": "hf"}, {"kind": "sentencepiece", "lossless": True}]
    names = st.sampled_from(["jaxlm_tokenizer.json", "tokenizer.json"])
    content = changed(specs) | damaged([json.dumps(spec).encode() for spec in specs])

    def read(case: tuple[str, bytes]) -> None:
        shutil.rmtree(tmp_path / "t", ignore_errors=True)
        use(load_tokenizer(write(tmp_path / "t", {case[0]: case[1]})))

    fuzz(st.tuples(names, content), read, 250)


@pytest.mark.parametrize("name", ["jaxlm_tokenizer.json", "tokenizer.json"])
@pytest.mark.parametrize(
    "content", ["[" * 100_000, '{"kind": ' * 100_000, '{"kind": "chars", "alphabet": [{}]}', '{"kind": []}']
)
def test_tokenizer_folders_that_are_none(tmp_path: Path, name: str, content: str):
    write(tmp_path, {name: content})
    with pytest.raises(UserError, match=rf"{name}: "):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("kind", HF_KINDS)
def test_hugging_face_tokenizers(hf_specs: dict[str, str], tmp_path: Path, kind: str):
    spec = json.loads(hf_specs[kind])
    patterns = ["(a+)+$", "(x+x+)+y", "(.*)*\\1", "(", "(?<!", "a{99999}", "\\p{L}+", "", "(?=a)"]
    steps = [{"type": "Split", "pattern": {"Regex": p}, "behavior": "Isolated", "invert": False} for p in patterns]
    steps += [spec["pre_tokenizer"], {"type": "Digits", "individual_digits": True}, {"type": "Whitespace"}, {"type": 1}]
    orders = st.lists(st.sampled_from(steps), max_size=3).map(lambda found: [*found, spec["pre_tokenizer"]])

    def with_steps(found: list[Any]) -> bytes:
        return json.dumps(spec | {"pre_tokenizer": {"type": "Sequence", "pretokenizers": found}}).encode()

    content = changed([spec]) | changed([spec]) | damaged([json.dumps(spec).encode()]) | orders.map(with_steps)

    def read(content: bytes) -> None:
        use(load_tokenizer(write(tmp_path, {"tokenizer.json": content}) / "tokenizer.json"))

    fuzz(content, read, 100)


def test_characters_without_a_piece(hf_specs: dict[str, str], tmp_path: Path):
    spec = json.loads(hf_specs["metaspace"])
    spec["model"]["unk_id"], spec["model"]["byte_fallback"] = None, True
    spec["model"]["vocab"] = [[piece, score] for piece, score in spec["model"]["vocab"]]
    tokenizer = load_tokenizer(write(tmp_path, {"tokenizer.json": json.dumps(spec)}) / "tokenizer.json")
    tokenizer.num_threads = 1
    with pytest.raises(UserError, match=r"tokenizer\.json: `tokenizers` fails with it .*unk_id"):
        tokenizer.encode(["漢字"])


# Configurations


def test_saved_configurations(tmp_path: Path):
    saved = {"config": dataclasses.asdict(get_config()), "versions": {}, "vocab_size": 5, "history": []}
    path = tmp_path / "config.json"

    def read(content: bytes) -> None:
        path.write_bytes(content)
        validate(cli.from_saved(cli.read_saved(path)["config"], str(path))[0])

    fuzz(changed([saved]) | changed([saved]) | damaged([json.dumps(saved).encode()]), read, 250)


def test_overrides(tmp_path: Path):
    base, keys = get_config(), list(key_types())
    before = flatten(base)
    key = st.sampled_from(keys) | st.sampled_from(keys) | st.text(max_size=8)
    words = [
        "1",
        "-1",
        "1e400",
        "nan",
        "0x10",
        "9" * 5000,
        "true",
        "None",
        "",
        "a=b",
        "\n",
        "s3://a:b@c/d",
        "[0]",
        "%s",
    ]
    value = st.text(max_size=8) | st.sampled_from(words) | st.integers().map(str) | st.floats().map(str)
    forms = ["--config.{}={}", "--config.{} {}", "--noconfig.{}", "--config.{}", "-config.{}={}", "--{}={}", "-{} {}",
             "--flagfile={}", "-flagfile {}", "-undefok={}", "{}={}", "--config={}", "-help", "--"]  # fmt: skip
    argument = st.builds(str.format, st.sampled_from(forms), key, value)
    argument |= st.sampled_from([f"--config.{key}={value}" for key, value in before.items()])

    def read(arguments: list[str]) -> None:
        found = cli.apply_overrides(base, [word for a in arguments for word in a.split(" ", 1)])
        assert validate(found) is found and flatten(base) == before

    fuzz(st.lists(argument, min_size=1, max_size=3), read, 350)


def test_options_are_read_from_no_other_file(tmp_path: Path):
    path = write(tmp_path, {"more": "--config.steps=7\n", "binary": bytes(range(256))})
    for name in ("more", "binary", "none"):
        for option in (f"-flagfile={path / name}", f"--flagfile={path / name}"):
            assert refusal(option) == f"{option.split('=')[0]}: unknown option; see --help"
    assert "unknown option" in refusal("-flagfile", str(path / "more"))
    assert "unknown option" in refusal("-undefok=nope", "-nope=1")
    assert "very long name" in refusal("-" + "9" * 5000)


# Secrets

WITH_SECRETS = [
    "s3://user:pa55word@bucket/x.jsonl",
    "s3://AKIA0:pa5/5word+x@bucket/*.jsonl",
    "https://user:pa55word@host/x.jsonl",
    "https://pa55word@host/x.jsonl",
    "https://host:8080/x.jsonl?download=1&token=pa55word",
    "https://bucket.s3.amazonaws.com/x.jsonl?X-Amz-Signature=pa55word",
    "https://account.blob.core.windows.net/x.jsonl?sv=1&sig=pa55word",
    "simplecache::s3://user:pa55word@bucket/x.jsonl",
]
WITHOUT = [
    "s3://bucket/a:b@c.jsonl",
    "https://host:8080/user@home/x.jsonl?version=2&author=me",
    "sftp://user@host:22/x.jsonl",
    "abfs://container@account.dfs.core.windows.net/x.jsonl",
    "github://owner:repository@main/x.jsonl",
    "hf://datasets/owner/name@~parquet/x.jsonl",
    "/folder/a:b@c.jsonl",
]


@pytest.mark.parametrize("address", WITH_SECRETS)
def test_addresses_with_secrets(config: Config, address: str):
    """config.json would keep them. Refused where a command line is read, where data is, and never said."""
    keys = {
        "data.path": ["--config.data.source=jsonl", f"--config.data.path={address}"],
        "data.val_path": ["--config.data.source=jsonl", "--config.data.path=a", f"--config.data.val_path={address}"],
        "data.mixture": [f"--config.data.mixture=0.5 stdlib; 0.5 jsonl {address}"],
        "data.tokenizer_path": [f"--config.data.tokenizer_path={address}"],
        "checkpoint.resume": [f"--config.checkpoint.resume={address}"],
    }
    for key, overrides in keys.items():
        said = refusal(*overrides)
        assert said.startswith(f"{key} has an address with credentials in it") and "environment" in said
    for change in ({"path": address}, {"mixture": f"1 stdlib; 1 jsonl {address}"}, {"tokenizer_path": address}):
        own = dataclasses.replace(config, data=dataclasses.replace(config.data, source="jsonl", **change))
        with pytest.raises(UserError, match="credentials come from the environment") as caught:
            prepare(own, progress=False)
        assert "pa5" not in str(caught.value)
    assert "pa5" not in "".join(refusal(*overrides) for overrides in keys.values())


@pytest.mark.parametrize("address", WITHOUT)
def test_addresses_without(address: str):
    config = cli.load(BASE, ["--config.data.source=jsonl", f"--config.data.path={address}"])
    assert config.data.path == address
    cli.load(BASE, [f"--config.data.mixture=1 jsonl {address}; 1 text user:name@host"])


# Datasets of tensorflow_datasets


@pytest.mark.parametrize("name", ["huggingface:lm1b", "kaggle:some/config:1.0.0"])
def test_datasets_that_are_code(config: Config, name: str):
    config.data.source, config.data.tfds_name = "tfds", name
    with pytest.raises(UserError, match=rf"data\.tfds_name is '{name}': the datasets of a namespace are code"):
        prepare(config, progress=False)


def test_features_that_are_code(config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A module that can be imported, which a dataset's folder names."""
    features = {"pythonClassName": "a_module_of_others.Feature", "featuresDict": {"features": {}}}
    info = {"name": "some", "version": "1.0.0", "fileFormat": "tfrecord", "splits": []}
    write(tmp_path, {"a_module_of_others.py": "raise SystemExit", "some/1.0.0/features.json": json.dumps(features),
                     "some/1.0.0/dataset_info.json": json.dumps(info)})  # fmt: skip
    monkeypatch.syspath_prepend(tmp_path)
    config.data.source, config.data.tfds_name, config.data.path = "tfds", "some:1.0.0", str(tmp_path)
    with pytest.raises(UserError, match=r"features\.json wants the code of a_module_of_others\.Feature"):
        prepare(config, progress=False)


def test_datasets_that_are_damaged(config: Config, monkeypatch: pytest.MonkeyPatch):
    def broken() -> Any:
        yield {"text": b"a"}
        raise RuntimeError("{{function_node x}} corrupted record at 176")

    monkeypatch.setattr(tfds_source, "_builder", lambda data: type("Builder", (), {"data_dir": "folder"}))
    monkeypatch.setattr(tfds_source, "_examples", lambda *args: (2, broken))
    with pytest.raises(UserError, match=r"folder: split train is unreadable \(corrupted record at 176\)"):
        list(tfds_source._read(config.data, "train", None, 0, 1))
