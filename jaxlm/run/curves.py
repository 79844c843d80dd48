"""What a run recorded, for its report: metrics.jsonl read as a stream, and curves with fewer points."""

import math
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxlm.checkpoint import metrics_file, rollback
from jaxlm.checkpoint.metrics_file import Metrics
from jaxlm.config import UserError, flatten
from jaxlm.config.files import from_saved, read_saved

POINTS = 800  # most points of a curve; a page shows no more
TRAINING = ("lr", "grad_norm", "skipped", "spikes", "tokens_per_second", "step_seconds", "mfu", "peak_memory_bytes")
LAYERS = ("layers/grad_norm", "layers/update_ratio", "layers/activation_rms")  # lists, with log.layer_stats
MOST_LAYERS = 16  # of a deeper model, so many layers, evenly spread
EVALUATION = ("eval_loss", "eval_bits_per_byte", "eval_accuracy")


class Series(NamedTuple):
    """Numbers over steps, which rise; NaN where a line has none."""

    steps: np.ndarray
    columns: dict[str, np.ndarray]

    def last(self, key: str) -> float:
        """The last finite number; NaN if there is none."""
        known = self.columns[key][np.isfinite(self.columns[key])]
        return float(known[-1]) if len(known) else math.nan


class History(NamedTuple):
    """A run as its workdir tells it."""

    name: str
    config: dict[str, Any]  # flat, with the versions as versions.jax and so on
    changes: list[tuple[str, str]]  # [(time, what changed)]
    returns: list[rollback.Return]
    training: Series  # `loss` is the mean since the line before
    evaluations: Series
    samples: list[tuple[int, str]]  # [(step, text)]
    layers: dict[str, Series]  # {one of LAYERS: a column for each layer, named 0, 1, ...}; without what has no number

    @property
    def tokens_per_step(self) -> int:
        return self.config["batch_size"] * self.config["seq_len"]

    @property
    def last_step(self) -> int:
        return int(self.training.steps[-1])

    @property
    def total_hours(self) -> float:
        return float(self.hours(self.training.steps)[-1])

    def hours(self, steps: np.ndarray) -> np.ndarray:
        """Hours of training up to these steps, without evaluations, saves and pauses."""
        known = self.training.steps
        seconds = np.nan_to_num(self.training.columns["step_seconds"])
        sums = np.cumsum(np.diff(known, prepend=0) * seconds) / 3600
        return np.interp(steps, [0, *known], [0, *sums])


def read_history(workdir: Path, name: str) -> History:
    """Reads a workdir.

    Raises:
      UserError: a file of the run is missing or damaged.
    """
    path = workdir / "config.json"
    saved = read_saved(path)
    config = flatten(from_saved(saved["config"], str(path))[0])
    versions, history = saved.get("versions"), saved.get("history")
    if not isinstance(versions, dict) or not isinstance(history, list):
        raise UserError(f"{path}: versions or history are missing; allowed: what a run wrote there")
    changes = [(str(entry.get("time")), str(entry.get("changed"))) for entry in history if isinstance(entry, dict)]
    numbers = _read_metrics(workdir)
    config |= {f"versions.{key}": value for key, value in versions.items()}
    return History(name, config, changes, rollback.read(workdir), *numbers)


class _Columns:
    """Grows one number a column and line; a million lines take 80 MB."""

    def __init__(self, keys: Sequence[str]):
        self.steps, self.columns = array("q"), {key: array("d") for key in keys}

    def append(self, step: int, numbers: Metrics) -> None:
        if not self.steps or step > self.steps[-1]:
            self.steps.append(step)
            for key, column in self.columns.items():
                column.append(_number(numbers.get(key)))

    def done(self) -> Series:
        return Series(np.array(self.steps), {key: np.array(column) for key, column in self.columns.items()})


def _number(value: object) -> float:
    try:
        return float(value) if isinstance(value, int | float) else math.nan
    except OverflowError:  # an integer of many digits
        return math.nan


def _read_metrics(workdir: Path) -> tuple[Series, Series, list[tuple[int, str]], dict[str, Series]]:
    training, evaluations, samples = _Columns(("loss", *TRAINING)), _Columns(EVALUATION), []
    layers: dict[str, _Columns] = {}
    for m in metrics_file.stream(workdir):
        if "eval_loss" in m:
            evaluations.append(m["step"], m)
            if isinstance(m.get("sample"), str):
                samples.append((m["step"], m["sample"]))
        else:
            training.append(m["step"], m | {"loss": m.get("loss_mean", m.get("loss"))})
            for key in LAYERS:
                if isinstance(found := m.get(key), list) and found:
                    named = {str(i): number for i, number in enumerate(found)}
                    layers.setdefault(key, _Columns(_spread([*named]))).append(m["step"], named)
    if not training.steps:
        raise UserError(f"{workdir / metrics_file.NAME}: no step in it; allowed: a run that has made a step")
    return training.done(), evaluations.done(), samples, {key: column.done() for key, column in layers.items()}


def _spread(names: list[str]) -> list[str]:
    places = np.linspace(0, len(names) - 1, min(len(names), MOST_LAYERS)).round().astype(int)
    return [names[i] for i in places]


class Drawn(NamedTuple):
    """A curve as a page draws it."""

    line: tuple[list[float], list[float]]
    extremes: tuple[list[float], list[float]] | None  # behind the line, if that is of means


def drawn(x: np.ndarray, y: np.ndarray, points: int = POINTS) -> Drawn:
    """Returns a curve with at most so many points, without those that are not finite.

    A longer curve is divided into parts, which are equally wide on its axis. The line has the mean of each part;
    `extremes` has the lowest and the highest point of each, so no spike is lost, and the first and the last of all.

    Args:
      x: rises.
    """
    known = np.isfinite(y)
    x, y = x[known], y[known]
    if len(x) <= points:
        return Drawn(_pairs(x, y), None)
    parts = points // 2 - 1
    edges = np.searchsorted(x, np.linspace(x[0], x[-1], parts + 1)[1:-1])
    means, kept = [], {0, len(x) - 1}
    for start, end in zip([0, *edges], [*edges, len(x)], strict=True):
        if start < end:
            part = y[start:end]
            means.append((x[start:end].mean(), part.mean()))
            kept |= {start + int(part.argmin()), start + int(part.argmax())}
    chosen = sorted(kept)
    return Drawn(_pairs(*np.transpose(means)), _pairs(x[chosen], y[chosen]))


def _pairs(x: np.ndarray, y: np.ndarray) -> tuple[list[float], list[float]]:
    return [_short(value, 7) for value in x], [_short(value, 5) for value in y]


def _short(value: float, digits: int) -> float:
    """The number with so many digits, as JSON writes it shortest."""
    rounded = float(f"{value:.{digits}g}")
    return int(rounded) if rounded.is_integer() else rounded
