"""The report of one or several runs: a page of their curves, samples and configurations.

It needs the files of the workdirs alone. Nothing here imports jax.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxlm.run.curves import History, Series, drawn, read_history
from jaxlm.run.layer_charts import layer_charts
from jaxlm.run.pages import Lines, Table, Texts, check_path, write_page

NAME = "report.html"
SAMPLES, LONGEST = 10, 1500  # samples of a run, and characters of a sample
MOST_SAMPLES = 24  # of all runs, but one of each
FEW = 4  # runs, each of which the page describes at its top, and draws the layers
SPEEDS = ("tokens_per_second", "mfu")
NOISY = (*SPEEDS, "grad_norm")
NOTHING = "–"


def write_own(workdir: Path, say: Callable[[str], None]) -> None:
    """Writes the report of a finished run in its workdir. The run is done: an error becomes a line, whatever it is."""
    try:
        check_path(str(workdir / NAME), workdir / NAME)
        write_report(workdir / NAME, [read_history(workdir, workdir.resolve().name)])
    except Exception as error:
        say(f"{workdir / NAME} is not written: {error or type(error).__name__}")


def write_report(path: Path, runs: Sequence[History], title: str = "", first: Sequence[Table] = ()) -> None:
    """Writes the report as one page. The runs' names differ.

    Args:
      title: of the page, if it should have another one.
      first: tables that come before all others.

    Raises:
      UserError: the file cannot be written.
    """
    several = len(runs) > 1
    parts: list[Any] = [*first, _overview(runs)]
    if several:
        parts.append(_differences(runs))
    parts += [*_losses(runs), *_training(runs)]
    if len(runs) <= FEW:
        parts += [chart for run in runs for chart in layer_charts(run, several)]
    parts += [*_returns(runs), *_samples(runs), *_changes(runs)]
    parts.append(_configuration(runs))
    title = title or "jaxlm report: " + (f"{len(runs)} runs" if several else runs[0].name)
    write_page(path, title, _summary(runs), parts)


def _summary(runs: Sequence[History]) -> str:
    """A sentence about each run; of many, only about the one with the lowest validation loss."""
    if len(runs) <= FEW:
        return "; ".join(_sentence(run, len(runs) > 1) for run in runs) + "."
    scored = [(run.evaluations.columns["eval_loss"][best[0]], run) for run in runs if (best := _best(run.evaluations))]
    if not scored:
        return f"{len(runs)} runs."
    _, lowest = min(scored, key=lambda pair: pair[0])
    return f"{len(runs)} runs; the lowest validation loss has {_sentence(lowest, True)}."


def _sentence(run: History, named: bool) -> str:
    text = f"{run.name}: " * named + f"{run.last_step:,} of {run.config['steps']:,} steps"
    text += f", {_count(run.last_step * run.tokens_per_step)} tokens in {hours_of(run)}"
    if best := _best(run.evaluations):
        text += f", validation loss {run.evaluations.columns['eval_loss'][best[0]]:.4f} after step {best[1]:,}"
    return text


def _best(evaluations: Series) -> tuple[int, int] | None:
    """(place, step) of the lowest validation loss; None without evaluations"""
    losses = evaluations.columns["eval_loss"]
    if not np.isfinite(losses).any():
        return None
    place = int(np.nanargmin(np.where(np.isfinite(losses), losses, np.nan)))
    return place, int(evaluations.steps[place])


def _count(number: float) -> str:
    for size, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number:.3g}"


def hours_of(run: History) -> str:
    hours = run.total_hours
    if hours * 60 < 2:
        return f"{hours * 3600:.1f} seconds"
    return f"{hours:.1f} hours" if hours >= 2 else f"{hours * 60:.1f} minutes"


def _known(number: float, text: str) -> str:
    """The number in a format; a dash if there is none."""
    return text.format(number) if np.isfinite(number) else NOTHING


def _median(run: History, key: str) -> float:
    """Without the first step, which includes compilation."""
    values = run.training.columns[key][run.training.steps > 1]
    values = values[np.isfinite(values)]
    return float(np.median(values)) if len(values) else np.nan


def _overview(runs: Sequence[History]) -> Table:
    def column(run: History) -> dict[str, str]:
        train, scores, best = run.training, run.evaluations, _best(run.evaluations)
        place, step = best or (0, 0)
        return {
            "steps": f"{run.last_step:,}" + f" of {run.config['steps']:,}" * (run.last_step < run.config["steps"]),
            "tokens": _count(run.last_step * run.tokens_per_step),
            "time of the steps": hours_of(run),
            "training loss, last": _known(train.last("loss"), "{:.4f}"),
            "validation loss, last": _known(scores.last("eval_loss"), "{:.4f}"),
            "validation loss, best": f"{scores.columns['eval_loss'][place]:.4f}" if best else NOTHING,
            "after step": f"{step:,}" if best else NOTHING,
            "bits per byte there": _known(scores.columns["eval_bits_per_byte"][place], "{:.4f}") if best else NOTHING,
            "accuracy there": _known(scores.columns["eval_accuracy"][place], "{:.1%}") if best else NOTHING,
            "tokens per second, median": _known(_median(run, "tokens_per_second"), "{:,.0f}"),
            "MFU, median": _known(_median(run, "mfu"), "{:.1%}"),
            "peak memory": _known(train.last("peak_memory_bytes") / 1e9, "{:.3g} GB"),
            "skipped steps": _known(train.last("skipped"), "{:,.0f}"),
            "spikes": _known(train.last("spikes"), "{:,.0f}"),
            "returns to a checkpoint": str(len(run.returns)),
        }

    columns = [column(run) for run in runs]
    rows = [(key, *(values[key] for values in columns)) for key in columns[0]]
    rows = [row for row in rows if set(row[1:]) != {NOTHING}]
    return Table("Overview", ("", *(run.name for run in runs)), rows)


class _Curves:
    """Gathers the curves of a chart."""

    def __init__(self, runs: Sequence[History]):
        self._names = [run.name for run in runs]
        self._behind, self._lines, self._dashed, self._faint = {}, {}, {}, {}

    def add(self, name: str, x: np.ndarray, y: np.ndarray, means: bool = True) -> None:
        """Adds the curve of a run. If it has many points, it is of means, with the extremes behind it, or the extremes
        alone.
        """
        line, extremes = drawn(x, y)
        self._lines[name] = line if means else extremes or line
        if extremes and means:
            behind = self._free(f"{name} · extremes")
            self._behind[behind], self._faint[behind] = extremes, name

    def add_dashed(self, name: str, what: str, x: np.ndarray, y: np.ndarray) -> None:
        dashed = self._free(f"{name} · {what}")
        self._lines[dashed], self._dashed[dashed] = drawn(x, y).line, name

    def _free(self, name: str) -> str:
        while name in self._names:
            name += "*"
        self._names.append(name)
        return name

    def chart(self, title: str, x: str, y: str, note: str = "", log_y: bool = False) -> Lines | None:
        """None without any point."""
        if not any(places for places, _ in self._lines.values()):
            return None
        curves = self._behind | self._lines
        return Lines(title, x, y, curves, False, log_y, note, self._dashed, self._faint)


def _losses(runs: Sequence[History]) -> list[Lines]:
    """Training and validation loss over tokens, and over hours, or over minutes if all runs are short."""
    minutes = max(run.total_hours for run in runs) < 2
    unit, factor = ("minutes", 60) if minutes else ("hours", 1)

    def tokens(run: History, steps: np.ndarray) -> np.ndarray:
        return steps * run.tokens_per_step

    def time(run: History, steps: np.ndarray) -> np.ndarray:
        return run.hours(steps) * factor

    zoom = (
        "Dashed: validation. Pale, here and below: the extremes of the steps of which a line is the mean. A drag across"
        " a chart zooms in, a double click zooms out."
    )
    alone = "The steps alone, without evaluations, saves and pauses."
    found = [
        _loss(runs, "Loss over tokens", "tokens", tokens, 0, zoom),
        _loss(runs, "Loss over tokens, without the first quarter", "tokens", tokens, 1 / 4, ""),
        _loss(runs, f"Loss over {unit}", unit, time, 0, alone),
    ]
    return [chart for chart in found if chart]


def _loss(
    runs: Sequence[History],
    title: str,
    axis: str,
    place: Callable[[History, np.ndarray], np.ndarray],
    start: float,
    note: str,
) -> Lines | None:
    """The chart of the losses, from a share `start` of its axis on."""
    curves = _Curves(runs)
    first = start * max(place(run, run.training.steps[-1:])[0] for run in runs)
    for run in runs:
        for series, key in ((run.training, "loss"), (run.evaluations, "eval_loss")):
            x = place(run, series.steps)
            x, y = x[x >= first], series.columns[key][x >= first]
            if key == "loss":
                curves.add(run.name, x, y)
            elif len(x):
                curves.add_dashed(run.name, "validation", x, y)
    return curves.chart(title, axis, "nats per token", note)


def _training(runs: Sequence[History]) -> list[Lines]:
    """What the steps recorded, over tokens; without charts that would be empty."""
    found = []

    def add(title: str, unit: str, key: str, note: str = "", factor: float = 1.0, log_y: bool = False) -> None:
        curves = _Curves(runs)
        for run in runs:
            steps, y = run.training.steps, run.training.columns[key] * factor
            shown = (y > 0) | (not log_y)
            if key in SPEEDS:
                shown &= steps > 1
            curves.add(run.name, steps[shown] * run.tokens_per_step, y[shown], means=key in NOISY)
        found.append(curves.chart(title, "tokens", unit, note, log_y))

    add("Learning rate", "learning rate", "lr")
    add("Norm of the gradient", "norm", "grad_norm", "Before clipping, on a logarithmic axis.", log_y=True)
    first = "Without the first step, which includes compilation."
    add("Throughput", "tokens per second", "tokens_per_second", first)
    add("Model FLOPs utilization", "% of the peak", "mfu", factor=100.0)
    add("Peak memory", "GB", "peak_memory_bytes", "Of the fullest device; on CPUs, of the process.", factor=1e-9)
    for title, key in (("Skipped steps", "skipped"), ("Spikes", "spikes")):
        if any(run.training.last(key) > 0 for run in runs):
            add(title, "so far", key)
    return [chart for chart in found if chart]


def _returns(runs: Sequence[History]) -> list[Table]:
    rows = [
        (run.name, f"{r.to:,}", f"{r.first:,} to {r.last:,}", f"{r.lr:.3g}", r.why) for run in runs for r in run.returns
    ]
    columns = ("run", "back to step", "without batches", "rates times", "why")
    return [Table("Returns to a checkpoint", columns, rows, words=True)] if rows else []


def _samples(runs: Sequence[History]) -> list[Texts]:
    found = []
    for run in runs:
        losses = dict(zip(run.evaluations.steps.tolist(), run.evaluations.columns["eval_loss"].tolist(), strict=True))
        count = min(SAMPLES, len(run.samples), max(1, MOST_SAMPLES // len(runs)))
        chosen = np.unique(np.linspace(len(run.samples) - 1, 0, count).round().astype(int))  # the last one first
        texts = []
        for step, text in (run.samples[i] for i in chosen):
            head = f"after step {step:,}" + _known(losses.get(step, np.nan), " · validation loss {:.4f}")
            plain = "".join(c if c.isprintable() or c in "\n\t" else "�" for c in text[:LONGEST])
            texts.append((head, plain + " …" * (len(text) > LONGEST)))
        note = f"{len(chosen)} of {len(run.samples)}, evenly spread." if len(chosen) < len(run.samples) else ""
        if texts:
            found.append(Texts("Samples" + f" of {run.name}" * (len(runs) > 1), texts, note))
    return found


def _changes(runs: Sequence[History]) -> list[Table]:
    rows = [(run.name, time[:16].replace("T", " "), changed) for run in runs for time, changed in run.changes]
    return [Table("Changed on the way", ("run", "time", "what"), rows, words=True)] if rows else []


def _rows(runs: Sequence[History]) -> list[tuple[str, ...]]:
    keys = dict.fromkeys(key for run in runs for key in run.config)
    return [(key, *(str(run.config.get(key, NOTHING)) for run in runs)) for key in keys]


def _differences(runs: Sequence[History]) -> Table:
    rows = [row for row in _rows(runs) if len(set(row[1:])) > 1]
    note = "" if rows else "Nothing: their configurations are the same."
    return Table("What differs between the runs", ("key", *(run.name for run in runs)), rows, note=note, words=True)


def _configuration(runs: Sequence[History]) -> Table:
    columns = ("key", *(run.name for run in runs))
    return Table("Configuration", columns, _rows(runs), words=True, folded=True)
