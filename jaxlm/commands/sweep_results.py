"""What a sweep found: a table of its points, means over seeds, a page of all curves, and an object for scripts."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxlm.commands.sweep_state import FAILED, Run, Sweep
from jaxlm.config import UserError, grid
from jaxlm.run.curves import History, read_history
from jaxlm.run.pages import Table, check_path, print_table
from jaxlm.run.report import NAME, hours_of, write_report

SEED = "seed"


class Result(NamedTuple):
    """A point and what its run has recorded; numbers that are not known are NaN."""

    run: Run
    index: int  # of the point
    workdir: Path
    status: str
    label: str  # what sets it apart from the other points
    history: History | None
    best: float = math.nan  # lowest validation loss, in nats per token
    best_step: int = 0
    bits: float = math.nan  # bits per byte there
    last: float = math.nan  # validation loss of the last evaluation

    def value(self, key: str) -> str:
        """The value of a key, also of one that only other points' grids name."""
        given = self.run.values.get(key)
        return given if given is not None else str(self.history.config[key]) if self.history else ""


def results(sweep: Sweep) -> list[Result]:
    """The points, the lowest validation loss first; those without one come last."""
    found = []
    for i, (run, label) in enumerate(zip(sweep.runs, _labels(sweep), strict=True)):
        workdir = sweep.workdir(run)
        try:
            history = read_history(workdir, label)
        except UserError:  # nothing to read yet
            history = None
        result = Result(run, i, workdir, sweep.status(run), label, history)
        found.append(_scored(result, history) if history else result)
    return sorted(found, key=lambda result: (math.isnan(result.best), result.best, result.index))


def _scored(result: Result, history: History) -> Result:
    scores = history.evaluations
    known = np.flatnonzero(np.isfinite(scores.columns["eval_loss"]))
    if not len(known):
        return result
    losses = scores.columns["eval_loss"][known]
    place = known[losses.argmin()]
    bits = float(scores.columns["eval_bits_per_byte"][place])
    return result._replace(
        best=float(losses.min()), best_step=int(scores.steps[place]), bits=bits, last=float(losses[-1])
    )


def _labels(sweep: Sweep) -> list[str]:
    """Short names: the keys whose values differ, without their sections if that leaves them different."""
    keys = [key for key in sweep.grid_keys() if len({run.values.get(key) for run in sweep.runs}) > 1]
    last = [key.rpartition(".")[2] for key in keys]
    shown = dict(zip(keys, last if len(set(last)) == len(last) else keys, strict=True))
    named = [grid.name_of({shown[k]: v for k, v in run.values.items() if k in shown}) for run in sweep.runs]
    return named if len(set(named)) == len(named) and all(named) else [run.name for run in sweep.runs]


def table_of(sweep: Sweep, found: Sequence[Result]) -> Table:
    columns: dict[str, list[str]] = {"point": [str(result.index) for result in found]}
    columns |= {key: [result.value(key) for result in found] for key in sweep.grid_keys()}
    columns |= {
        "best validation loss": [_shown(result.best) for result in found],
        "after step": [f"{result.best_step:,}" if result.best_step else "" for result in found],
        "bits/byte": [_shown(result.bits) for result in found],
        "last validation loss": [_shown(result.last) for result in found],
        "steps": [_steps(result.history) for result in found],
        "time": [hours_of(result.history) if result.history else "" for result in found],
        "state": [_ended(result) for result in found],
    }
    return _without_empty("Points", columns)


def _without_empty(title: str, columns: dict[str, list[str]], note: str = "") -> Table:
    """The table without columns in which nothing stands."""
    shown = {name: cells for name, cells in columns.items() if any(cells)}
    return Table(title, [*shown], [*zip(*shown.values(), strict=True)], note)


def _steps(history: History | None) -> str:
    if history is None:
        return ""
    steps = history.config["steps"]
    return f"{history.last_step:,}" + f" of {steps:,}" * (history.last_step < steps)


def _ended(result: Result) -> str:
    return f"{result.status} (exit code {result.run.exit})" if result.status in FAILED else result.status


def _shown(number: float) -> str:
    return f"{number:.4f}" if math.isfinite(number) else ""


class Mean(NamedTuple):
    """Finished points that differ in their seeds alone; a deviation of one seed is NaN."""

    values: dict[str, str]  # of the other keys
    seeds: int
    of: int  # points, finished or not
    best: tuple[float, float]  # mean and sample standard deviation of the lowest validation losses
    last: tuple[float, float]
    bits: tuple[float, float]


def means(sweep: Sweep, found: Sequence[Result]) -> list[Mean]:
    """The means over seeds, the lowest validation loss first; none if the seed is in no grid."""
    others = [key for key in sweep.grid_keys() if key != SEED]
    if len(others) == len(sweep.grid_keys()):
        return []
    groups: dict[tuple[str, ...], list[Result]] = {}
    for result in found:
        groups.setdefault(tuple(result.value(key) for key in others), []).append(result)
    averaged = []
    for values, group in groups.items():
        done = [result for result in group if result.status == "done" and math.isfinite(result.best)]
        numbers = [_mean([getattr(result, name) for result in done]) for name in ("best", "last", "bits")]
        averaged.append(Mean(dict(zip(others, values, strict=True)), len(done), len(group), *numbers))
    return sorted(averaged, key=lambda mean: (math.isnan(mean.best[0]), mean.best[0]))


def _mean(numbers: list[float]) -> tuple[float, float]:
    mean = float(np.mean(numbers)) if numbers else math.nan
    return mean, float(np.std(numbers, ddof=1)) if len(numbers) > 1 else math.nan


def means_table(averaged: Sequence[Mean]) -> Table:
    def shown(number: tuple[float, float]) -> str:
        return _shown(number[0]) + (f" ± {number[1]:.4f}" if math.isfinite(number[1]) else "")

    columns = {key: [mean.values[key] for mean in averaged] for key in averaged[0].values}
    columns |= {
        "seeds": [str(mean.seeds) + f" of {mean.of}" * (mean.seeds < mean.of) for mean in averaged],
        "best validation loss": [shown(mean.best) for mean in averaged],
        "bits/byte": [shown(mean.bits) for mean in averaged],
        "last validation loss": [shown(mean.last) for mean in averaged],
    }
    return _without_empty("Means over seeds", columns, "Finished points: mean ± standard deviation of one run.")


def conclude(sweep: Sweep) -> list[Result]:
    """Prints the tables and the object, and writes the page. Returns the points."""
    found, page = results(sweep), sweep.folder / NAME
    tables = [table_of(sweep, found)]
    if averaged := means(sweep, found):
        tables.append(means_table(averaged))
    for table in tables:
        print_table(table)
        print()
    for result in found:
        if result.status in FAILED and result.run.error:
            print(f"point {result.index} {result.status}: {result.run.error}")
    runs = [result.history for result in found if result.history]
    if runs:
        check_path(str(page), page)
        write_report(page, runs, f"jaxlm sweep: {sweep.folder.resolve().name}", tables)
        print(f"report: {page}")
    print(json.dumps(_summary(sweep, found, averaged)))
    return found


def _summary(sweep: Sweep, found: Sequence[Result], averaged: Sequence[Mean]) -> dict[str, Any]:
    """The object of the last line; null for what is not known."""

    def known(number: float) -> float | None:
        return number if math.isfinite(number) else None

    points = [
        {
            "index": result.index,
            "point": result.run.values,
            "workdir": str(result.workdir),
            "state": result.status,
            "exit": result.run.exit,
            "error": result.run.error or None,
            "steps": result.history.last_step if result.history else 0,
            "seconds": result.history.total_hours * 3600 if result.history else 0.0,
            "eval_loss": known(result.best),
            "step": result.best_step or None,
            "eval_bits_per_byte": known(result.bits),
            "eval_loss_last": known(result.last),
        }
        for result in found
    ]
    summary: dict[str, Any] = {"sweep": str(sweep.folder)}
    summary["best"] = points[0] if points and points[0]["eval_loss"] is not None else None
    summary["points"] = points
    if averaged:
        keys = ("eval_loss", "eval_loss_last", "eval_bits_per_byte")
        summary["means"] = [
            {"point": mean.values, "seeds": mean.seeds}
            | {key: [known(n) for n in pair] for key, pair in zip(keys, (mean.best, mean.last, mean.bits), strict=True)}
            for mean in averaged
        ]
    return summary
