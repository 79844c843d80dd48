"""A report shows every run's numbers, loses no spike, and refuses what is no run."""

import dataclasses
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxlm.config.files import load
from jaxlm.run import report
from jaxlm.run.curves import drawn, read_history
from tests.exit_codes import contents, tool
from tests.runs import CONFIG

BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
STEPS, SPIKE = 5000, 1234


def make_run(folder: Path, lr: float = 0.01) -> Path:
    """Writes the files of a run of STEPS steps of 8 x 16 tokens and 0.5 s, stopped for an hour after half of them."""
    folder.mkdir(parents=True)
    config = load(CONFIG, ["--config.batch_size=8", "--config.seq_len=16", f"--config.optim.lr={lr}"])
    config.steps = STEPS
    saved = {"config": dataclasses.asdict(config), "versions": {"jax": "1.2.3"}, "history": []}
    saved["history"].append({"time": "2030-01-02T03:04:05+0000", "changed": "steps 10 -> 5000"})
    (folder / "config.json").write_text(json.dumps(saved))
    lines: list[dict[str, Any]] = []
    for step in range(1, STEPS + 1):
        loss = 5 / step**0.1 + 40 * (step == SPIKE)
        m = {"step": step, "loss": 0.0, "loss_mean": loss, "lr": lr, "grad_norm": 0.5, "skipped": int(step > SPIKE)}
        m |= {"spikes": 0, "tokens": step * 128, "tokens_per_second": 256.0 if step > 1 else 1.0, "step_seconds": 0.5}
        lines.append(m | {"mfu": None, "peak_memory_bytes": 10**9, "time": step / 2 + 3600 * (step > STEPS / 2)})
        if step % 1000 == 0:
            scores = {"eval_loss": loss + 0.1, "eval_bits_per_byte": None, "eval_accuracy": 0.5}
            lines.append({"step": step, **scores, "sample": f"<b> sample of {step}\ud800"})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(m) + "\n" for m in lines) + '{"step": 5001, "los')
    back = {"to": 1200, "batches": [1201, 1234], "why": "5 steps in a row", "lr": 0.5}
    (folder / "returns.json").write_text(json.dumps([back]))
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two runs, whose folders have the same name."""
    root = tmp_path_factory.mktemp("runs")
    return [make_run(root / "a" / "run"), make_run(root / "b" / "run", lr=0.02)]


@pytest.fixture(scope="module")
def page(runs: list[Path]) -> Path:
    path = runs[0].parents[1] / "report.html"
    assert tool("report", *runs, "-o", path) == 0
    return path


def charts(page: Path) -> dict[str, dict[str, Any]]:
    """{title: the chart}"""
    text = page.read_text()
    found = re.search(r"^const charts = (.*);$", text, re.MULTILINE)
    titles = re.findall(r'<h2>([^<]*)</h2>(?:\s*<p class="note">[^<]*</p>)?\s*<div class="chart">', text)
    assert found
    return dict(zip(titles, json.loads(found[1]), strict=True))


def curves(chart: dict[str, Any]) -> dict[str, dict[float, float]]:
    return {name: dict(zip(*data, strict=True)) for name, data in zip(chart["names"], chart["data"], strict=True)}


@pytest.mark.parametrize("count", [0, 1, 2, 800, 801, 30_000])
def test_a_curve_has_few_points_and_loses_no_extreme(count: int):
    rng = np.random.default_rng(count)
    x, y = np.cumsum(rng.integers(1, 9, count)), rng.normal(size=count)
    y[:: max(2, count // 7)] *= 50
    y[1::100] = np.nan
    known = np.isfinite(y)
    line, extremes = drawn(x, y)
    assert len(line[0]) <= 800 and (extremes is None) == (known.sum() <= 800)
    if count:
        values = (extremes or line)[1]
        assert len(values) <= 800
        assert [min(values), max(values)] == pytest.approx([y[known].min(), y[known].max()], rel=1e-4)
    for places, _ in (line, extremes or line):
        assert places == sorted(places)
    if extremes:
        assert [extremes[0][0], extremes[0][-1]] == [x[known][0], x[known][-1]]
        part = x[known] < x[0] + (x[-1] - x[0]) / 399
        assert line[1][0] == pytest.approx(y[known][part].mean(), rel=0.05)


def test_the_charts_hold_the_numbers_of_the_runs(page: Path):
    found = charts(page)
    assert {"Learning rate", "Norm of the gradient", "Throughput", "Peak memory", "Skipped steps"} < found.keys()
    assert "Model FLOPs utilization" not in found and "Spikes" not in found  # nothing to show
    loss, hours = curves(found["Loss over tokens"]), curves(found["Loss over minutes"])
    spike = pytest.approx(5 / SPIKE**0.1 + 40, rel=1e-3)
    assert set(loss) > {"a/run", "b/run"}
    assert loss["a/run · extremes"][SPIKE * 128] == spike
    assert hours["a/run · extremes"][float(f"{SPIKE / 120:.7g}")] == spike
    assert max(loss["a/run"].values()) < 20  # the mean of a few steps
    scores = loss["b/run · validation"]
    assert [*scores] == [1000 * k * 128 for k in range(1, 6)]
    assert scores[128_000] == pytest.approx(5 / 1000**0.1 + 0.1, rel=1e-3)
    assert max(hours["a/run"]) == pytest.approx(STEPS / 120, rel=0.01)  # without the pause
    assert min(curves(found["Loss over tokens, without the first quarter"])["a/run"]) >= STEPS * 128 / 4
    assert set(curves(found["Throughput"])["a/run"].values()) == {256}  # without compilation
    assert curves(found["Learning rate"])["b/run"][128] == 0.02
    chart = found["Loss over tokens"]
    own = {n: c for n, c, d, f in zip(chart["names"], chart["colors"], chart["dashed"], chart["follows"], strict=True)
           if not d and f is None}  # fmt: skip
    assert own == {"a/run": 0, "b/run": 1}
    assert [chart["names"][i] for i in chart["follows"] if i is not None] == ["a/run", "b/run"]


def test_the_page_shows_samples_returns_and_what_differs(page: Path):
    text = page.read_text()
    assert len(text) < 500_000 and not re.search(r"""(src|href)\s*=\s*["']?(http|//)|@import|url\(|fetch\(""", text)
    for run in ("a/run", "b/run"):
        assert re.search(rf"<h2>Samples of {run}</h2>.*?&lt;b&gt; sample of 1000�</pre>", text, re.DOTALL)
    differs = re.search(r"<h2>What differs.*?</section>", text, re.DOTALL)
    assert differs and re.findall(r"<tr><td>(.*?)</td><td>(.*?)</td><td>(.*?)</td>", differs[0]) == [
        ("optim.lr", "0.01", "0.02")
    ]
    assert "<td>a/run</td><td>1,200</td><td>1,201 to 1,234</td><td>0.5</td><td>5 steps in a row</td>" in text
    assert "<td>2030-01-02 03:04</td><td>steps 10 -&gt; 5000</td>" in text
    assert "<td>versions.jax</td><td>1.2.3</td><td>1.2.3</td>" in text


def test_a_page_of_many_runs_names_the_best_and_has_one_entry_of_a_legend_for_each(runs: list[Path], tmp_path: Path):
    run = read_history(runs[0], "run")
    losses = run.evaluations.columns["eval_loss"]

    def with_loss(less: int) -> Any:
        columns = run.evaluations.columns | {"eval_loss": losses - less / 10}
        return run._replace(name=f"run {less}", evaluations=run.evaluations._replace(columns=columns))

    page = tmp_path / "page.html"
    report.write_report(page, [with_loss(less) for less in (0, 1, 5, 2, 3, 4, 6)])
    text = page.read_text()
    assert "<p>7 runs; the lowest validation loss has run 6: " in text
    chart = charts(page)["Loss over tokens"]
    assert sum(of is None for of in chart["follows"]) == 7 == len({*chart["colors"]})
    for name, of, dashed in zip(chart["names"], chart["follows"], chart["dashed"], strict=True):
        assert not dashed or name.startswith(chart["names"][of])
    shown = re.findall(r"<figcaption>after step ([\d,]+) ", text)
    assert len(shown) <= report.MOST_SAMPLES and "5,000" in shown


@pytest.mark.skipif(not BROWSER, reason="there is no chromium")
def test_a_browser_draws_every_chart_without_an_error(page: Path, tmp_path: Path):
    assert BROWSER
    options = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}", "--window-size=390,800"]
    logging = ["--enable-logging=stderr", "--v=0", "--dump-dom"]
    done = subprocess.run([BROWSER, *options, *logging, f"file://{page}"], capture_output=True, text=True, timeout=120)
    assert done.stdout.count("<canvas") == len(charts(page)) == 8
    assert "CONSOLE" not in done.stderr


def test_mistakes_end_in_one_line_and_write_nothing(
    runs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    good, copy = runs[0], tmp_path / "copy"
    shutil.copytree(good, copy)
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.html").write_text("<html>mine</html>")

    def message(*argv: object) -> str:
        before = contents(tmp_path)
        assert tool("report", *argv) == 2 and contents(tmp_path) == before
        error = capsys.readouterr().err
        assert len(error.splitlines()) == 1 and "allowed" in error
        return error

    page = tmp_path / "page.html"
    assert "empty" in message(tmp_path / "empty", "-o", page)
    assert "twice" in message(good, good, "-o", page)
    assert "-o is" in message(good, "-o", tmp_path / "none" / "page.html")
    assert "no page of jaxlm" in message(good, "-o", tmp_path / "notes.html")
    assert "--names is 'one'; allowed: 2" in message(*runs, "-o", page, "--names", "one")
    lines = (copy / "metrics.jsonl").read_text().splitlines(keepends=True)
    for damage in ("nonsense\n", '{"step": "three"}\n', f'{{"step": {10**30}}}\n', "[]\n", "\n"):
        (copy / "metrics.jsonl").write_text("".join([*lines[:2], damage, *lines[3:]]))
        assert "metrics.jsonl: line 3 was not written by a run" in message(copy, "-o", page)
    (copy / "metrics.jsonl").write_bytes(b"\xff\n")
    assert "metrics.jsonl: unreadable" in message(copy, "-o", page)
    (copy / "metrics.jsonl").unlink()
    assert "metrics.jsonl: no step in it" in message(copy, "-o", page)


def test_numbers_changed_by_hand_are_left_out(runs: list[Path], tmp_path: Path):
    copy = shutil.copytree(runs[0], tmp_path / "copy")
    odd = [{"step": 1, "loss": "x", "lr": 10**400}, {"step": 2, "loss": 3.0}, {"step": 1, "loss": 9.0}]
    (copy / "metrics.jsonl").write_text("".join(json.dumps(m) + "\n" for m in [*odd, {"step": 2, "eval_loss": None}]))
    run = read_history(copy, "run")
    assert run.training.steps.tolist() == [1, 2] and run.training.last("loss") == 3.0
    report.write_report(tmp_path / "page.html", [run])
    report.write_report(tmp_path / "page.html", [run, run._replace(name="again")])  # replaces its own page
    assert "2 runs" in (tmp_path / "page.html").read_text()


def test_a_run_ends_well_without_its_report(runs: list[Path], monkeypatch: pytest.MonkeyPatch):
    path, said = runs[0] / "report.html", []

    def missing(*args: object) -> None:
        raise ModuleNotFoundError("No module named 'jinja2'")

    with monkeypatch.context() as patch:
        patch.setattr(report, "write_page", missing)
        report.write_own(runs[0], said.append)
    assert said == [f"{path} is not written: No module named 'jinja2'"]
    path.mkdir()
    report.write_own(runs[0], said.append)
    assert len(said) == 2 and "allowed: a file" in said[1]
