"""The values that TensorBoard and Weights & Biases get."""

import struct
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from jaxlm.config import flatten
from jaxlm.config.files import load
from jaxlm.run import charts
from jaxlm.run.metrics import Log
from tests.runs import CONFIG

LINE = {"step": 2, "loss": 3.5, "lr": 0.1, "mfu": None, "epochs/text /home/me/books/*.txt": 0.25}
SCORES = {"step": 2, "eval_loss": 3.0, "eval_loss/text /home/me/books/*.txt": 2.5, "sample": "<a>\n# no heading"}


def events(folder: Path) -> list[Any]:
    """Reads the records of the event file. Each is a length, its checksum, the message, and its checksum."""
    from tensorboard.compat.proto import event_pb2

    kinds: Any = event_pb2
    (path,) = folder.iterdir()
    content, at, found = path.read_bytes(), 0, []
    while at < len(content):
        (size,) = struct.unpack_from("<Q", content, at)
        found.append(kinds.Event.FromString(content[at + 12 : at + 12 + size]))
        at += 16 + size
    return found


def test_tensorboard(tmp_path: Path):
    config = load(CONFIG)
    write = charts.shortened(charts.tensorboard(tmp_path, config, 0), ["text /home/me/books/*.txt"])
    log = Log([write], print)
    log(LINE)
    log(SCORES)
    values = {value.tag: value for event in events(tmp_path) for value in event.summary.value}
    numbers = {tag: v.simple_value for tag, v in values.items() if v.WhichOneof("value") == "simple_value"}
    assert numbers == pytest.approx(
        {"train/loss": 3.5, "train/lr": 0.1, "train/epochs/books": 0.25, "eval/loss": 3.0, "eval/loss/books": 2.5}
    )
    texts = {tag: v.tensor.string_val[0].decode() for tag, v in values.items() if tag not in numbers}
    assert all(values[tag].metadata.plugin_data.plugin_name == "text" for tag in texts)
    assert texts["eval/sample"] == "    <a>\n    # no heading"
    assert len(texts) == 2
    for key, value in flatten(config).items():
        shown = repr(value).replace("\n", "\\n")
        assert f"| {key} | `{shown}` |" in texts["configuration"].split("\n")


def test_each_layer_has_its_own_curve(tmp_path: Path):
    line = {"step": 2, "loss": 3.5, "grad_norm": 5.0, "layers/grad_norm": [1.0, float("nan")], "head/update_ratio": 0.5}
    Log([charts.by_layer(charts.shortened(charts.tensorboard(tmp_path, load(CONFIG), 0), []))], print)(line)
    numbers = {v.tag: v.simple_value for e in events(tmp_path) for v in e.summary.value if v.tag != "configuration"}
    want = {"train/loss": 3.5, "train/grad_norm": 5.0, "layer_0/grad_norm": 1.0, "layer_1/grad_norm": float("nan")}
    assert numbers == pytest.approx(want | {"head/update_ratio": 0.5}, nan_ok=True)
    got = []
    charts.by_layer(got.append)(line)
    assert [*got[0]] == ["step", "loss", "grad_norm", "layer_0/grad_norm", "layer_1/grad_norm", "head/update_ratio"]


@pytest.mark.parametrize(
    "names, short",
    [
        (["stdlib", "text books/*.txt", "jsonl web/*.jsonl.zst"], ["stdlib", "books", "web"]),
        (["text /data/en/a.txt", "text /data/de/a.txt"], ["en-a", "de-a"]),
        (["text *.txt", "parquet s3://bucket/part-*.parquet"], ["text", "bucket"]),
        (["tfds wiki40b/en:1.3.0", "tokens ../fineweb/train.bin"], ["en-1.3.0", "train"]),
        (["text a.txt", "text a.txt (2)", "stdlib"], ["a-1", "a-2", "stdlib"]),
        ([], []),
    ],
)
def test_short_names(names: list[str], short: list[str]):
    assert list(charts.short_names(names).values()) == short


def test_weights_and_biases(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Uses a stand-in for the package, which is optional."""
    begun, logged = [], []
    run = types.SimpleNamespace(log=lambda values, step: logged.append((step, values)))
    package: Any = types.SimpleNamespace(init=lambda **keys: begun.append(keys) or run, Html=lambda text: text)
    monkeypatch.setitem(sys.modules, "wandb", package)
    write = charts.shortened(charts.wandb_writer(load(CONFIG), tmp_path), ["text /home/me/books/*.txt"])
    for metrics in (LINE, SCORES):
        write(metrics | {"time": 1.0})
    assert begun[0]["config"] == flatten(load(CONFIG)) and begun[0]["id"] == (tmp_path / "wandb_id").read_text()
    assert logged == [
        (2, {"loss": 3.5, "lr": 0.1, "mfu": None, "epochs/books": 0.25}),
        (2, {"eval_loss": 3.0, "eval_loss/books": 2.5, "sample": "<pre>&lt;a&gt;\n# no heading</pre>"}),
    ]
