"""`jaxlm inspect` computes the known numbers of small corpora, and draws them."""

import json
import re
import xml.etree.ElementTree as ET
from pathlib import Path

import numpy as np
import pytest

from jaxlm.commands import inspect_charts
from jaxlm.data import inspect
from tests.corpora import write
from tests.inspecting import CHAT, TWO


def test_histograms(inspected, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    lengths = [1, 2, 3, 5, 9, 200]
    write(tmp_path, {f"{s}/{i}.txt": "xy" * n for s in "tv" for i, n in enumerate(lengths)})
    seen = inspected(seq_len=16)
    tokens, documents = seen.numbers["tokens"], seen.numbers["documents"]
    assert tokens["most_frequent"] == [[ord("x"), 220], [ord("y"), 220], [256, 6]]
    assert (tokens["total"], tokens["counted"], tokens["distinct"]) == (446, 446, 3)
    assert documents == {
        "total": 6,
        "counted": 6,
        "mean": 446 / 6,
        "median": 9.0,
        "min": 3,
        "max": 401,
        "longer_than_seq_len": 2 / 6,
    }
    assert re.search(r"'x' +█{40} 49\.33%", seen.out) and re.search(r"⟨bos⟩ +█ 1\.35%", seen.out)
    assert re.search(r"4 to 7 +█{40} 33\.33%", seen.out) and re.search(r"256 to 511 +█{20} 16\.67%", seen.out)
    assert "sample" not in seen.out
    assert re.findall(r"(\d+) to \d+ +(?:█+ )?(\S+)\n", seen.out)[-5:] == [
        ("16", "16.67%"),
        ("32", "0"),
        ("64", "0"),
        ("128", "0"),
        ("256", "16.67%"),
    ]

    monkeypatch.setattr(inspect, "SAMPLE_TOKENS", 100)
    monkeypatch.setattr(inspect, "BLOCK", 20)
    monkeypatch.setattr(inspect, "SAMPLE_DOCUMENTS", 3)
    seen = inspected(seq_len=16)
    assert "100 tokens, a sample, evenly spread over 446" in seen.out
    assert "3 documents, a sample, evenly spread over 6" in seen.out
    assert seen.numbers["documents"]["max"] == 19 and seen.numbers["tokens"]["counted"] == 100


def test_one_document_is_singular_and_a_tiny_share_is_not_zero():
    found = inspect.Documents(np.array([3]), 1)
    assert inspect_charts.document_chart(found, "").title == "1 document"
    lengths = np.array([2] * 40_000 + [8])
    chart = inspect_charts.document_chart(inspect.Documents(lengths, len(lengths)), "")
    assert [bar.text for bar in chart.bars] == ["100.00%", "0", "<0.01%"]


def test_a_sample_spreads_over_the_whole_corpus():
    assert inspect.spread(5, 10).tolist() == [0, 1, 2, 3, 4]
    picked = inspect.spread(10**10, 10**6)
    assert len(picked) == 10**6 and picked[0] == 0 and set(np.diff(picked)) == {10**4}


def test_documents_of_bare_tokens_are_counted_at_the_beginning_only(
    inspected, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    write(tmp_path, TWO)
    inspected(seq_len=4)
    tokenizer = next((tmp_path / "cache").glob("*/tokenizer"))
    np.save(tmp_path / "ids.npy", np.array([[256, 1, 2, 3, 4]] * 100, np.uint16).ravel())
    keys = {
        "data__source": "tokens",
        "data__path": tmp_path / "ids.npy",
        "data__tokenizer_path": tokenizer,
        "data__vocab_size": 257,
        "seq_len": 4,
    }
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
        r"26 tokens: ⟨bos⟩\x1b<user>ab;\x1b<assistant>cd;⟨bos⟩"
    ] * 2
    masked, learned = (
        (float(r.get("width", "")), float(r.get("fill-opacity", ""))) for r in documents[0].findall(f"{space}rect")
    )
    assert masked[0] == pytest.approx(968 * 22 / 40, abs=0.1) and learned[0] == pytest.approx(968 * 4 / 40, abs=0.1)
    assert masked[1] < learned[1] == 1
    texts = [text.text for text in root.findall(f"{space}text")]
    assert "52 tokens" in texts and r"'\x1b'" in texts
