"""What the model is shown to see: rows of small corpora, letter by letter, and the numbers of them."""

import collections
import io
import json
import re
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from jaxlm.cli import load
from jaxlm.data import inspect, prepare
from jaxlm.main import exit_code
from tests.corpora import write
from tools import inspect_data

ROOT = Path(__file__).parents[1]
CONFIG = ROOT / "configs/base.py"
TWO = {"t/1.txt": "abc", "t/2.txt": "defghij", "v/1.txt": "abc", "v/2.txt": "defghij"}  # 4 and 8 tokens
CHAT = [{"m": [{"role": "user", "content": "ab"}, {"role": "assistant", "content": "cd"}]}] * 2
NAMES = re.compile(r"^(update|validation batch) \d+ · row \d+ of \d+ ")


def flags(folder: Path, **keys: Any) -> list[str]:
    keys = {"data__source": "text", "data__path": folder / "t", "data__tokenizer": "bytes", "batch_size": 2} | keys
    if "data__mixture" not in keys and keys["data__source"] != "tokens":
        keys |= {"data__val_path": folder / "v"}
    keys |= {"data__cache_dir": folder / "cache"}
    return [f"--config.{k.replace('__', '.')}={v}" for k, v in keys.items()]


class Seen:
    """What a command printed: headers of rows, their lines, all of it, and the numbers."""

    def __init__(self, out: str):
        self.out, self.numbers = out, json.loads(out.splitlines()[-1])
        self.headers, self.rows = [], []
        for line in out.splitlines():
            if NAMES.match(line):
                self.headers.append(line)
                self.rows.append([])
            elif line.startswith("│ "):
                self.rows[-1].append(line.removeprefix("│ "))


@pytest.fixture
def inspected(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    """Runs the command on what is in `tmp_path`."""
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)

    def run(*argv: object, **keys: Any) -> Seen:
        code, out, error = call(monkeypatch, capsys, *argv, *flags(tmp_path, **keys))
        assert code == 0, error
        return Seen(out)

    return run


def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *argv: object) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["inspect_data.py", "--config", str(CONFIG), *map(str, argv)])
    capsys.readouterr()
    try:
        code = exit_code(inspect_data.main, "inspect_data.py")
    except SystemExit as stop:  # of the parser
        code = int(stop.code or 0)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


# Rows


def test_documents_that_run_on(inspected, tmp_path: Path):
    write(tmp_path, TWO)
    seen = inspected(seq_len=11)  # one window is all there is
    assert seen.rows == [["‹⟨bos · 4 tokens⟩›abc", "⟨bos · 7 tokens⟩defghij"]] * 2
    assert seen.headers[1] == "update 1 · row 2 of 2 · documents: 2 · targets: 11 learned"
    assert seen.numbers["batch"] == {
        "rows": 2, "targets": 22, "learned": 22, "masked": 0, "padding": 0, "documents": 4}  # fmt: skip
    assert seen.numbers["padding_share"] == 0 and seen.numbers["mixture"] == []


def test_validation_ends_in_padding(inspected, tmp_path: Path):
    write(tmp_path, TWO)
    first, last = (inspected("--split", "val", "--step", n, seq_len=5) for n in (0, 1))
    assert first.rows == [["‹⟨bos · 4 tokens⟩›abc", "⟨bos · 1 token⟩d"], ["⟨goes on · 5 tokens⟩‹d›efghi"]]
    assert last.rows == [["⟨goes on · 1 token⟩‹i›j", "⟨padding · 4 places⟩"]]
    assert last.headers == ["validation batch 2 · row 1 of 1 · documents: 1 · targets: 1 learned, 4 padding"]
    assert last.numbers["padding_share"] == pytest.approx(4 / 15)


def test_a_window_that_ends_with_a_document(inspected, tmp_path: Path):
    write(tmp_path, TWO)
    assert inspected("--split", "val", "--rows", 1, seq_len=4).rows == [["‹⟨bos · 4 tokens⟩›abc⟨bos⟩"]]


def test_packed_documents(inspected, tmp_path: Path):
    write(tmp_path, TWO | {"t/3.txt": "k"})
    abc, defghij = "‹⟨bos · 4 tokens⟩›abc⟨bos⟩", "‹⟨bos · 8 tokens⟩›defghij⟨bos⟩"
    packed = {"data__packing": "document", "batch_size": 8}
    seen = inspected("--split", "val", seq_len=12, **packed)
    assert seen.rows == [[abc, defghij]] and seen.numbers["batch"]["documents"] == 2
    seen = inspected("--split", "val", seq_len=8, **packed)
    assert seen.rows == [[abc, "⟨padding · 4 places⟩"], [defghij]]
    assert seen.headers[0].endswith("documents: 1 · targets: 4 learned, 4 padding")
    assert seen.numbers["padding_share"] == 0.25 and "25.00% of all places are padding" in seen.out
    seen = inspected("--split", "val", seq_len=3, **packed)
    assert sorted(seen.rows) == sorted([
        ["‹⟨bos · 3 tokens⟩›abc"], ["‹⟨bos · 3 tokens⟩›def"], ["⟨goes on · 3 tokens⟩‹f›ghi"],
        ["⟨goes on · 1 token⟩‹c›⟨bos⟩", "⟨goes on · 2 tokens⟩‹i›j⟨bos⟩"],
    ])  # fmt: skip


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("packing", ["concat", "document"])
def test_padding_is_that_of_all_rows(tmp_path: Path, split: Any, packing: str):
    lengths = np.random.default_rng(0).integers(0, 60, 40)
    write(tmp_path, {f"{s}/{i}.txt": "x" * (n + 1) for s in "tv" for i, n in enumerate(lengths.tolist())})
    config = load(CONFIG, flags(tmp_path, seq_len=32, data__packing=packing))
    corpus = prepare(config, progress=False)
    part = inspect.View(corpus, config, split).parts[0]
    config.batch_size = part.count if split == "val" else part.per_epoch  # an epoch in a batch
    view = inspect.View(corpus, config, split)
    counts, (share, rows) = view.batch(0).counts(), view.padding()
    assert share == pytest.approx(counts["padding"] / (counts["rows"] * 32))
    assert (share > 0) == (split == "val" or packing == "document") and sum(rows) == pytest.approx(1)
    tokens = lengths.sum() + 2 * 40  # with bos; packed ones are all learned, else all but the first and a rest
    assert 0 <= tokens - counts["learned"] <= (0 if packing == "document" else 1 if split == "val" else 32)


@pytest.mark.parametrize("packing", ["concat", "document"])
def test_masks(inspected, tmp_path: Path, packing: str):
    lines = "".join(json.dumps(record) + "\n" for record in CHAT)
    write(tmp_path, {"t": lines, "v": lines})
    keys = {"data__source": "jsonl", "data__messages_key": "m", "data__chat_template": "<{role}>{content};"}
    seen = inspected("--split", "val", seq_len=25, data__packing=packing, **keys)
    conversation = "<user>ab;<assistant>›cd;"  # 6 + 3 + 11 and 3 tokens, after a bos
    if packing == "document":
        assert seen.rows == [[f"‹⟨bos · 24 tokens⟩{conversation}⟨bos⟩", "⟨padding · 1 place⟩"]] * 2
        assert seen.numbers["batch"] == {
            "rows": 2, "targets": 50, "learned": 8, "masked": 40, "padding": 2, "documents": 2}  # fmt: skip
    else:  # the second bos is learned, as the end of the first conversation, and what follows it is not
        rest = conversation.removeprefix("<")
        assert seen.rows == [
            [f"‹⟨bos · 24 tokens⟩{conversation}", "⟨bos · 1 token⟩"],
            [f"⟨goes on · 22 tokens⟩‹<{rest}", "⟨padding · 3 places⟩"],
        ]
        assert [h.partition("targets: ")[2] for h in seen.headers] == [
            "4 learned, 21 masked", "3 learned, 19 masked, 3 padding"]  # fmt: skip
    assert seen.numbers["tokens"]["learned_share"] == 8 / 48 and "16.7% are learned" in seen.out


def test_mixture(inspected, tmp_path: Path):
    files = {f"{letter}/{i}.txt": letter * 40 for letter in "ab" for i in range(8)}
    write(tmp_path, files)
    paths = {letter: f"text {tmp_path / letter}" for letter in "ab"}
    keys = {
        "data__mixture": f"3 {paths['a']}; 1 {paths['b']}",
        "data__path": "",
        "batch_size": 6,
        "seq_len": 8,
        "steps": 5,
        "optim__warmup_steps": 0,
    }
    total: dict[str, int] = collections.Counter()
    shares = set()
    for step in range(5):
        seen = inspected("--step", step, "--rows", 6, **keys)
        names = [re.search(r" of 6 · (.*?) · ", header) for header in seen.headers]
        sources = [name[1] for name in names if name]
        for source, row in zip(sources, seen.rows, strict=True):
            assert ("a" in "".join(row)) == (source == paths["a"])
        total.update(sources)
        for found, letter, wanted in zip(seen.numbers["mixture"], "ab", (0.75, 0.25), strict=True):
            path = paths[letter]
            assert found["source"] == path and found["wanted"] == wanted
            assert found["batch"] == pytest.approx(sources.count(path) / 6)
            assert found["so_far"] == pytest.approx(total[path] / (6 * (step + 1)))
            shares.add((found["batch"], found["so_far"]))
    assert len(shares) > 4, "the shares of a batch and of all before it differ"
    epochs = seen.numbers["mixture"][0]["epochs"]
    tokens = len(prepare(load(CONFIG, flags(tmp_path, **keys)), progress=False).shares[0].train)
    assert epochs == pytest.approx(total[paths["a"]] / ((tokens - 1) // 8))
    assert f"wanted 75.0% · {epochs:.3g} epochs in all" in seen.out


def test_ids_without_a_text(inspected, tmp_path: Path):
    np.save(tmp_path / "ids.npy", np.arange(30, dtype=np.uint16))
    seen = inspected(data__source="tokens", data__path=tmp_path / "ids.npy", data__vocab_size=50, seq_len=4,
                     data__val_fraction=0.5, batch_size=3)  # fmt: skip
    for row in seen.rows:
        found = re.match(r"‹(\d+) ›", row[0])
        assert found
        first = int(found[1])
        assert row == [f"‹{first} ›" + "".join(f"{first + k} " for k in range(1, 5))]
    assert seen.numbers["documents"] is seen.numbers["batch"]["documents"] is None
    assert "15 tokens\n15 of 50 ids occur" in seen.out and "  id 14  " in seen.out


def test_characters_that_would_disturb_a_terminal(inspected, tmp_path: Path):
    text = "\x1b[31m\x07\x7f\r\t\u202e\u2028\xa0‹é› :x: \\ 漢"
    write(tmp_path, {"t/1.txt": text, "v/1.txt": text})
    num = len(text.encode())
    shown = r"\x1b[31m\x07\x7f\r\t\u202e\u2028\xa0\u2039é\u203a :x: \ 漢"
    assert inspected("--rows", 1, seq_len=num).rows == [[f"‹⟨bos · {num} tokens⟩›{shown}"]]
    cut = len(text[: text.index("é")].encode()) + 1  # tokens up to the middle of é, with bos
    seen = inspected("--split", "val", seq_len=cut, batch_size=1, data__packing="document")
    assert seen.rows[0][0].endswith(r"\u2039\xc3")
    seen = inspected("--split", "val", "--step", 1, seq_len=cut, batch_size=1, data__packing="document")
    assert seen.rows[0][0].startswith(rf"⟨goes on · {num + 1 - cut} tokens⟩‹\xc3›\xa9\u203a :x:")


def test_a_terminal_is_shown_styles(tmp_path: Path):
    write(tmp_path, TWO)
    config = load(CONFIG, flags(tmp_path, seq_len=5))
    corpus = prepare(config, progress=False)
    batch = inspect.View(corpus, config, "val").batch(0)
    shown = io.StringIO()
    console = Console(file=shown, force_terminal=True, color_system="standard", no_color=False)
    console.print(inspect_data.row_text(batch, 1, corpus.tokenizer, plain=False))
    assert shown.getvalue() == "\x1b[1;36m⟨goes on · 5 tokens⟩\x1b[0m\x1b[2md\x1b[0mefghi\n"


# Numbers and the picture


def test_histograms(inspected, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    lengths = [1, 2, 3, 5, 9, 200]
    write(tmp_path, {f"{s}/{i}.txt": "xy" * n for s in "tv" for i, n in enumerate(lengths)})
    seen = inspected(seq_len=16)
    tokens, documents = seen.numbers["tokens"], seen.numbers["documents"]
    assert tokens["most_frequent"] == [[ord("x"), 220], [ord("y"), 220], [256, 6]]
    assert (tokens["total"], tokens["counted"], tokens["distinct"]) == (446, 446, 3)
    assert documents == {"total": 6, "counted": 6, "mean": 446 / 6, "median": 9.0, "min": 3, "max": 401,
                         "longer_than_seq_len": 2 / 6}  # fmt: skip
    assert re.search(r"'x' +█{40} 49\.33%", seen.out) and re.search(r"⟨bos⟩ +█ 1\.35%", seen.out)
    assert re.search(r"4 to 7 +█{40} 33\.33%", seen.out) and re.search(r"256 to 511 +█{20} 16\.67%", seen.out)
    assert "sample" not in seen.out
    assert re.findall(r"(\d+) to \d+ +(?:█+ )?(\S+)\n", seen.out)[-5:] == [
        ("16", "16.67%"), ("32", "0"), ("64", "0"), ("128", "0"), ("256", "16.67%")]  # fmt: skip

    monkeypatch.setattr(inspect, "SAMPLE_TOKENS", 100)
    monkeypatch.setattr(inspect, "BLOCK", 20)
    monkeypatch.setattr(inspect, "SAMPLE_DOCUMENTS", 3)
    seen = inspected(seq_len=16)
    assert "100 tokens, a sample, evenly spread over 446" in seen.out
    assert "3 documents, a sample, evenly spread over 6" in seen.out
    assert seen.numbers["documents"]["max"] == 19 and seen.numbers["tokens"]["counted"] == 100


def test_one_document_and_little_that_is_not_nothing():
    found = inspect.Documents(np.array([3]), 1)
    assert inspect_data.document_chart(found, 16).title == "1 document"
    lengths = np.array([2] * 40_000 + [8])
    chart = inspect_data.document_chart(inspect.Documents(lengths, len(lengths)), 16)
    assert [bar.text for bar in chart.bars] == ["100.00%", "0", "<0.01%"]


def test_a_sample_is_of_the_whole_corpus():
    assert inspect.spread(5, 10).tolist() == [0, 1, 2, 3, 4]
    picked = inspect.spread(10**10, 10**6)
    assert len(picked) == 10**6 and picked[0] == 0 and set(np.diff(picked)) == {10**4}


def test_documents_of_many_bare_tokens(inspected, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write(tmp_path, TWO)
    inspected(seq_len=4)
    tokenizer = next((tmp_path / "cache").glob("*/tokenizer"))
    np.save(tmp_path / "ids.npy", np.array([[256, 1, 2, 3, 4]] * 100, np.uint16).ravel())
    keys = {"data__source": "tokens", "data__path": tmp_path / "ids.npy", "data__tokenizer_path": tokenizer,
            "data__vocab_size": 257, "seq_len": 4}  # fmt: skip
    assert inspected(**keys).numbers["documents"]["total"] == 95
    monkeypatch.setattr(inspect, "SAMPLE_TOKENS", 52)
    monkeypatch.setattr(inspect, "BLOCK", 10)
    seen = inspected(**keys)
    assert "10 documents, the first of the corpus" in seen.out
    assert seen.numbers["documents"]["total"] is None and seen.numbers["documents"]["max"] == 5


def test_picture(inspected, tmp_path: Path):
    lines = "".join(json.dumps(record) + "\n" for record in CHAT)
    write(tmp_path, {"t": lines, "v": lines})
    keys = {"data__source": "jsonl", "data__messages_key": "m", "data__chat_template": "\x1b<{role}>{content};"}
    path = tmp_path / "data.svg"
    seen = inspected("-o", path, "--split", "val", seq_len=40, data__packing="document", **keys)
    assert seen.numbers["picture"] == str(path)
    root = ET.parse(path).getroot()
    space = "{http://www.w3.org/2000/svg}"
    documents = root.findall(f"{space}g")
    assert [g.findtext(f"{space}title") for g in documents] == [
        r"26 tokens: ⟨bos⟩\x1b<user>ab;\x1b<assistant>cd;⟨bos⟩"] * 2  # fmt: skip
    masked, learned = (
        (float(r.get("width", "")), float(r.get("fill-opacity", ""))) for r in documents[0].findall(f"{space}rect")
    )
    assert masked[0] == pytest.approx(968 * 22 / 40, abs=0.1) and learned[0] == pytest.approx(968 * 4 / 40, abs=0.1)
    assert masked[1] < learned[1] == 1
    texts = [text.text for text in root.findall(f"{space}text")]
    assert "52 tokens" in texts and r"'\x1b'" in texts


# Refusals

WRONG = {  # options: words of the message
    ("--split", "test"): ["--split is 'test'", "train, val"],
    ("--step", "-1"): ["--step is -1", "0 to steps - 1 = 1749"],
    ("--step", "1750"): ["--step is 1750", "0 to steps - 1 = 1749"],
    ("--step", "2", "--split", "val"): ["--step is 2", "--split=val", "0 to 1"],
    ("--step", "-1", "--split", "val"): ["--step is -1", "0 or more"],
    ("--step", "some"): ["--step", "'some'"],
    ("--rows", "0"): ["--rows is 0", "1 to batch_size = 2"],
    ("--rows", "3"): ["--rows is 3", "1 to batch_size = 2"],
    ("-o", "data.png"): ["-o is 'data.png'", ".svg"],
    ("-o", "FILES/none/data.svg"): ["-o is 'FILES/none/data.svg'", "cannot be written"],
    ("-o", "FILES/folder.svg"): ["-o is 'FILES/folder.svg'", "cannot be written"],
    ("-o", "/dev/null/data.svg"): ["-o is '/dev/null/data.svg'"],
    ("-o", ""): ["-o is ''", "a path"],
    ("--row", "1"): ["--row"],
    ("--config.batch_sise=1",): ["batch_sise", "batch_size"],
}


@pytest.mark.parametrize("wrong", WRONG, ids=" ".join)
def test_refusals(tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch, wrong: tuple[str, ...]):
    write(tmp_path, TWO | {"folder.svg/file": ""})
    prepare(load(CONFIG, flags(tmp_path, seq_len=3)), progress=False)
    before = sorted(tmp_path.rglob("*"))
    argv = [arg.replace("FILES", str(tmp_path)) for arg in wrong]
    code, out, error = call(monkeypatch, capsys, *argv, *flags(tmp_path, seq_len=3))
    assert (code, out) == (2, "") and error.count("\n") == 1, error
    assert error.startswith("inspect_data.py: ")
    assert all(word in error.replace(str(tmp_path), "FILES") for word in WRONG[wrong]), error
    assert sorted(tmp_path.rglob("*")) == before


def test_a_picture_that_cannot_be_written_in_the_end(tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch):
    write(tmp_path, TWO)

    write_text = Path.write_text

    def full(self: Path, *args: Any) -> int:
        if self.suffix == ".svg":
            raise OSError(28, "No space left on device")
        return write_text(self, *args)

    monkeypatch.setattr(Path, "write_text", full)
    code, out, error = call(monkeypatch, capsys, "-o", tmp_path / "a.svg", *flags(tmp_path, seq_len=3))
    assert (code, out) == (2, "") and "a.svg': No space left on device" in error


def test_the_command_line_imports_no_jax(tmp_path: Path):
    write(tmp_path, TWO)
    program = "import runpy, sys; runpy.run_path('tools/inspect_data.py')['main'](); print('jax' in sys.modules)"
    command = [sys.executable, "-c", program, "--config", str(CONFIG), *flags(tmp_path, seq_len=4)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "False"
    assert json.loads(done.stdout.splitlines()[-2])["split"] == "train"
