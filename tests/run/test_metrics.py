"""Peak speeds of devices, and invalid lines in metrics.jsonl. Whole runs test the other metrics."""

import json
import math
from pathlib import Path

import pytest

from jaxlm.checkpoint.metrics_file import JsonLines, evaluations, stream, validation_losses
from jaxlm.run.metrics import peak_flops


@pytest.mark.parametrize(
    "kind, teraflops",
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 NVL", 835),
        ("NVIDIA H200", 989),
        ("NVIDIA GB200", 2500),
        ("NVIDIA B200", 2250),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA L40S", 362),
        ("NVIDIA L40", 181),
        ("NVIDIA L4", 121),
        ("Tesla T4", 65),
        ("NVIDIA T400", None),
        ("NVIDIA GeForce RTX 4090", 165),
        ("cpu", None),
    ],
)
def test_peak_of_a_device(kind: str, teraflops: float | None) -> None:
    assert peak_flops(kind) == (None if teraflops is None else teraflops * 1e12)


def test_numbers_that_are_not_finite_become_null(tmp_path: Path):
    line = {"step": 3, "loss": math.nan, "layers/grad_norm": [1.5, math.inf, math.nan], "epochs": 0.5}
    JsonLines(tmp_path / "metrics.jsonl", 0)(line)
    assert [*stream(tmp_path)] == [{"step": 3, "loss": None, "layers/grad_norm": [1.5, None, None], "epochs": 0.5}]


def test_lines_without_a_valid_evaluation_are_ignored(tmp_path: Path):
    line = {"step": 3, "eval_loss": 1.5, "eval_perplexity": None, "eval_accuracy": 0.5, "eval_bits_per_byte": None}
    changed = [line | {"step": 4} | other for other in ({"eval_perplexity": "x"}, {"sample": 1}, {"eval_accuracy": []})]
    texts = [
        *map(json.dumps, [line, *changed, {"step": 5, "eval_loss": 2}, [], 1]),
        "{",
        "[" * 9999,
        '{"step": 1e999, "eval_loss": 1}',
        "\udcff",
    ]
    (tmp_path / "metrics.jsonl").write_bytes("\n".join(texts).encode(errors="surrogateescape"))
    assert evaluations(tmp_path) == {3: line | {"eval_perplexity": math.inf}}
    assert validation_losses(tmp_path) == {3: 1.5, 4: 1.5, 5: 2.0}  # only the losses must be valid here
    (tmp_path / "none").mkdir()
    (tmp_path / "none/metrics.jsonl").mkdir()
    assert evaluations(tmp_path / "none") == {}
