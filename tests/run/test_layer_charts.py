"""Statistics of layers from a run to metrics.jsonl, to `jaxlm show`, and to the report's charts."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxlm.run.curves import History, read_history
from jaxlm.run.layer_charts import MOST_POINTS, layer_charts
from jaxlm.run.pages import Lines
from tests.exit_codes import tool
from tests.run.test_report import charts, curves
from tests.runs import lines, run

KEYS = {"steps": 4, "log.every_steps": 2, "eval.every_steps": 0, "log.layer_stats": True, "model.num_layers": 3}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    workdir = tmp_path_factory.mktemp("layers") / "run"
    assert run(workdir, **KEYS) == 0
    return workdir


def test_metrics_hold_lists_and_the_report_draws_them(finished: Path, capsys: pytest.CaptureFixture[str]):
    training = [m for m in lines(finished) if "loss" in m]
    assert [m["step"] for m in training] == [1, 2, 4]
    assert all(len(m["layers/grad_norm"]) == 3 and m["head/grad_norm"] > 0 for m in training)
    found = charts(finished / "report.html")
    got = curves(found["Norm of the gradient, by layer"])
    assert [*got] == ["layer 0", "layer 1", "layer 2"]
    for i, curve in enumerate(got.values()):
        known = {m["step"] * 128: m["layers/grad_norm"][i] for m in training if m["layers/grad_norm"][i] > 0}
        assert curve == pytest.approx(known, rel=1e-4) and len(curve) >= 2
    assert found["Activations, by layer"]["ordered"] and not found["Learning rate"]["ordered"]
    assert tool("show", finished) == 0
    shown = " ".join(f"{x:.6g}" for x in training[-1]["layers/activation_rms"])
    assert shown in capsys.readouterr().out


def deep(finished: Path, folder: Path, steps: int, **changed: Any) -> History:
    """A run of 40 layers, whose layer i has the gradient i + step / 1000."""
    shutil.copytree(finished, folder)
    first = lines(finished)[0]
    made = [first | {"step": s, "layers/grad_norm": [i + s / 1000 for i in range(40)]} for s in range(1, steps + 1)]
    made[1] |= changed
    (folder / "metrics.jsonl").write_text("".join(json.dumps(m) + "\n" for m in made))
    history = read_history(folder, "deep")
    history.config["model.num_layers"] = 40
    return history


def chart_of(history: History, several: bool = False) -> Lines:
    return layer_charts(history, several)[0]


def test_a_chart_of_many_layers_and_steps_has_few_points(finished: Path, tmp_path: Path):
    chart = chart_of(deep(finished, tmp_path / "deep", 3000), several=True)
    assert chart.title.endswith(", deep") and "16 of 40 layers. Means" in chart.note
    names = [*chart.curves]
    assert (names[0], names[-1], len(names)) == ("layer 0", "layer 39", 16)
    assert 500 < sum(len(x) for x, _ in chart.curves.values()) <= MOST_POINTS
    for name, (x, y) in chart.curves.items():
        np.testing.assert_allclose(y, int(name.split()[1]) + np.array(x) / 128 / 1000, rtol=1e-3)


@pytest.mark.parametrize("value", [None, 3.0, [], ["x"] * 40, [None] * 40, [1.0], {"a": 1}, [[1.0]] * 40, [10**400]])
def test_numbers_changed_by_hand_are_left_out(finished: Path, tmp_path: Path, value: object):
    history = deep(finished, tmp_path / "deep", 3, **{"layers/grad_norm": value})
    assert chart_of(history).curves["layer 39"] == ([128, 384], [39.001, 39.003])


def test_a_run_without_them_has_no_charts(finished: Path, tmp_path: Path):
    shutil.copytree(finished, tmp_path / "plain")
    plain = [{k: v for k, v in m.items() if "layers/" not in k} for m in lines(finished)]
    (tmp_path / "plain/metrics.jsonl").write_text("".join(json.dumps(m) + "\n" for m in plain))
    assert layer_charts(read_history(tmp_path / "plain", "plain"), False) == []
