"""`jaxlm inspect` prints the rows of small corpora letter by letter, and refuses wrong options."""

import collections
import io
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from jaxlm.commands import inspect as inspect_data
from jaxlm.config.files import load
from jaxlm.data import inspect, prepare
from tests.corpora import write
from tests.inspecting import CHAT, CONFIG, ROOT, TWO, call, flags

# Rows


def test_concatenated_documents(inspected, tmp_path: Path):
    write(tmp_path, TWO)
    seen = inspected(seq_len=11)  # the corpus is one window
    assert seen.rows == [["‹⟨bos · 4 tokens⟩›abc", "⟨bos · 7 tokens⟩defghij"]] * 2
    assert seen.headers[1] == "update 1 · row 2 of 2 · documents: 2 · targets: 11 learned"
    assert seen.numbers["batch"] == {"rows": 2, "targets": 22, "learned": 22, "masked": 0, "padding": 0, "documents": 4}
    assert seen.numbers["padding_share"] == 0 and seen.numbers["mixture"] == []


def test_validation_ends_in_padding(inspected, tmp_path: Path):
    write(tmp_path, TWO)
    first, last = (inspected("--split", "val", "--step", n, seq_len=5) for n in (0, 1))
    assert first.rows == [["‹⟨bos · 4 tokens⟩›abc", "⟨bos · 1 token⟩d"], ["⟨continued · 5 tokens⟩‹d›efghi"]]
    assert last.rows == [["⟨continued · 1 token⟩‹i›j", "⟨padding · 4 places⟩"]]
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
    assert sorted(seen.rows) == sorted(
        [
            ["‹⟨bos · 3 tokens⟩›abc"],
            ["‹⟨bos · 3 tokens⟩›def"],
            ["⟨continued · 3 tokens⟩‹f›ghi"],
            ["⟨continued · 1 token⟩‹c›⟨bos⟩", "⟨continued · 2 tokens⟩‹i›j⟨bos⟩"],
        ]
    )


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("packing", ["concat", "document"])
def test_the_padding_share_covers_all_rows(tmp_path: Path, split: Any, packing: str):
    lengths = np.random.default_rng(0).integers(0, 60, 40)
    write(tmp_path, {f"{s}/{i}.txt": "x" * (n + 1) for s in "tv" for i, n in enumerate(lengths.tolist())})
    config = load(CONFIG, flags(tmp_path, seq_len=32, data__packing=packing))
    corpus = prepare(config, progress=False)
    part = inspect.View(corpus, config, split).parts[0]
    config.batch_size = part.num_eval_rows if split == "val" else part.rows_per_epoch  # one batch holds an epoch
    view = inspect.View(corpus, config, split)
    counts, (share, rows) = view.batch(0).counts(), view.padding()
    assert share == pytest.approx(counts["padding"] / (counts["rows"] * 32))
    assert (share > 0) == (split == "val" or packing == "document") and sum(rows) == pytest.approx(1)
    # With bos. Packed: all are learned; otherwise, all except the first and less than two windows.
    tokens = lengths.sum() + 2 * 40
    assert 0 <= tokens - counts["learned"] <= (0 if packing == "document" else 1 if split == "val" else 63)


@pytest.mark.parametrize("packing", ["concat", "document"])
def test_masks(inspected, tmp_path: Path, packing: str):
    lines = "".join(json.dumps(record) + "\n" for record in CHAT)
    write(tmp_path, {"t": lines, "v": lines})
    keys = {"data__source": "jsonl", "data__messages_key": "m", "data__chat_template": "<{role}>{content};"}
    seen = inspected("--split", "val", seq_len=25, data__packing=packing, **keys)
    conversation = "<user>ab;<assistant>›cd;"  # bos, then 6 + 3 + 11 masked and 3 learned tokens
    if packing == "document":
        assert seen.rows == [[f"‹⟨bos · 24 tokens⟩{conversation}⟨bos⟩", "⟨padding · 1 place⟩"]] * 2
        assert seen.numbers["batch"] == {
            "rows": 2,
            "targets": 50,
            "learned": 8,
            "masked": 40,
            "padding": 2,
            "documents": 2,
        }
    else:  # the second bos is learned, as the end of the first conversation; the tokens after it are not
        rest = conversation.removeprefix("<")
        assert seen.rows == [
            [f"‹⟨bos · 24 tokens⟩{conversation}", "⟨bos · 1 token⟩"],
            [f"⟨continued · 22 tokens⟩‹<{rest}", "⟨padding · 3 places⟩"],
        ]
        assert [h.partition("targets: ")[2] for h in seen.headers] == [
            "4 learned, 21 masked",
            "3 learned, 19 masked, 3 padding",
        ]
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
    assert len(shares) > 4, "the shares of a batch and of all batches so far must differ"
    epochs = seen.numbers["mixture"][0]["epochs"]
    tokens = len(prepare(load(CONFIG, flags(tmp_path, **keys)), progress=False).shares[0].train)
    assert epochs == pytest.approx(total[paths["a"]] / ((tokens - 8) // 8))
    assert f"wanted 75.0% · {epochs:.3g} epochs in all" in seen.out


def test_ids_without_a_tokenizer(inspected, tmp_path: Path):
    np.save(tmp_path / "ids.npy", np.arange(30, dtype=np.uint16))
    seen = inspected(
        data__source="tokens",
        data__path=tmp_path / "ids.npy",
        data__vocab_size=50,
        seq_len=4,
        data__val_fraction=0.5,
        batch_size=3,
    )
    for row in seen.rows:
        found = re.match(r"‹(\d+) ›", row[0])
        assert found
        first = int(found[1])
        assert row == [f"‹{first} ›" + "".join(f"{first + k} " for k in range(1, 5))]
    assert seen.numbers["documents"] is seen.numbers["batch"]["documents"] is None
    assert "15 tokens\n15 of 50 ids occur" in seen.out and "  id 14  " in seen.out


def test_characters_that_would_disturb_a_terminal_are_escaped(inspected, tmp_path: Path):
    text = "\x1b[31m\x07\x7f\r\t\u202e\u2028\xa0‹é› :x: \\ 漢"
    write(tmp_path, {"t/1.txt": text, "v/1.txt": text})
    num = len(text.encode())
    shown = r"\x1b[31m\x07\x7f\r\t\u202e\u2028\xa0\u2039é\u203a :x: \ 漢"
    assert inspected("--rows", 1, seq_len=num).rows == [[f"‹⟨bos · {num} tokens⟩›{shown}"]]
    cut = len(text[: text.index("é")].encode()) + 1  # tokens up to the middle of é, with bos
    seen = inspected("--split", "val", seq_len=cut, batch_size=1, data__packing="document")
    assert seen.rows[0][0].endswith(r"\u2039\xc3")
    seen = inspected("--split", "val", "--step", 1, seq_len=cut, batch_size=1, data__packing="document")
    assert seen.rows[0][0].startswith(rf"⟨continued · {num + 1 - cut} tokens⟩‹\xc3›\xa9\u203a :x:")


def test_a_terminal_gets_styles(tmp_path: Path):
    write(tmp_path, TWO)
    config = load(CONFIG, flags(tmp_path, seq_len=5))
    corpus = prepare(config, progress=False)
    batch = inspect.View(corpus, config, "val").batch(0)
    shown = io.StringIO()
    console = Console(file=shown, force_terminal=True, color_system="standard", no_color=False)
    console.print(inspect_data.row_text(batch, 1, corpus.tokenizer, plain=False))
    assert shown.getvalue() == "\x1b[1;36m⟨continued · 5 tokens⟩\x1b[0m\x1b[2md\x1b[0mefghi\n"


# Refusals

WRONG = {  # options: words in the message
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
def test_wrong_options_are_refused(tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch, wrong: tuple[str, ...]):
    write(tmp_path, TWO | {"folder.svg/file": ""})
    prepare(load(CONFIG, flags(tmp_path, seq_len=3)), progress=False)
    before = sorted(tmp_path.rglob("*"))
    argv = [arg.replace("FILES", str(tmp_path)) for arg in wrong]
    code, out, error = call(monkeypatch, capsys, *argv, *flags(tmp_path, seq_len=3))
    assert (code, out) == (2, "") and error.count("\n") == 1, error
    assert error.startswith(("jaxlm: ", "jaxlm inspect: "))
    assert all(word in error.replace(str(tmp_path), "FILES") for word in WRONG[wrong]), error
    assert sorted(tmp_path.rglob("*")) == before


def test_a_picture_whose_write_fails_is_refused(tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch):
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
    program = "import sys; from jaxlm.commands import inspect; inspect.main(sys.argv[1:]); print('jax' in sys.modules)"
    command = [sys.executable, "-c", program, "--config", str(CONFIG), *flags(tmp_path, seq_len=4)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "False"
    assert json.loads(done.stdout.splitlines()[-2])["split"] == "train"
