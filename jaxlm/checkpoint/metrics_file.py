"""metrics.jsonl: appends lines, drops those that a resumed run will repeat, and reads scores."""

import json
import math
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from jaxlm.config import MAX_INT, UserError
from jaxlm.host.durable import append, sync, write_whole

NAME = "metrics.jsonl"
Metrics = dict[str, Any]


class JsonLines:
    """Appends one object a line to metrics.jsonl, after dropping the lines that a resumed run will repeat."""

    def __init__(self, path: Path, resume_step: int):
        if path.exists():
            kept = [line for line in path.read_text().splitlines(keepends=True) if _step_of(line) <= resume_step]
            write_whole(path, "".join(kept))
        self._path = path

    def __call__(self, metrics: Metrics) -> None:
        append(self._path, (json.dumps({k: _known(v) for k, v in metrics.items()}) + "\n").encode())

    def sync(self) -> None:
        if self._path.exists():
            sync(self._path)
            sync(self._path.parent)


def _known(value: Any) -> Any:
    """The value with None for numbers that are not finite, which JSON does not have."""
    if isinstance(value, list):
        return [_known(x) for x in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def stream(workdir: Path) -> Iterator[Metrics]:
    """Yields the lines of metrics.jsonl one by one, without the last one if it is incomplete; nothing without a file.

    Raises:
      UserError: the file cannot be read, or holds anything but a run's lines.
    """
    path = workdir / NAME
    if not path.exists():
        return
    try:
        with path.open(encoding="utf-8", newline="\n") as file:
            for number, line in enumerate(file, 1):
                if line.endswith("\n"):
                    yield _parsed(line, f"{path}: line {number}")
    except UserError:
        raise
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: unreadable ({error}); allowed: the metrics of a run, or no file") from error


def _parsed(line: str, where: str) -> Metrics:
    with suppress(ValueError, KeyError, TypeError, RecursionError):
        step = (found := json.loads(line))["step"]
        if type(step) is int and 0 <= step <= MAX_INT:
            return found
    raise UserError(f"{where} was not written by a run; allowed: the metrics of a run, or no file")


def check(workdir: Path) -> None:
    """Raises UserError if metrics.jsonl holds anything but a run's lines; the last one may be incomplete."""
    for _ in stream(workdir):
        pass


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return float("inf")  # incomplete: the run was killed while it wrote it


def _objects(workdir: Path) -> Iterator[Metrics]:
    """Yields the lines of metrics.jsonl that are JSON objects."""
    path = workdir / "metrics.jsonl"
    for line in path.read_text("utf-8", errors="replace").splitlines() if path.is_file() else []:
        with suppress(ValueError, RecursionError):  # an incomplete line
            if isinstance(found := json.loads(line), dict):
                yield found


def evaluations(workdir: Path) -> dict[int, Metrics]:
    """Returns {step: its line in metrics.jsonl} of the evaluations so far; leaves out lines that lack a score."""
    found = {}
    for m in _objects(workdir):
        with suppress(ValueError, KeyError, TypeError, OverflowError):  # a training line, or one changed by hand
            bits, sample = m["eval_bits_per_byte"], m.get("sample")
            if isinstance(sample, str | None) and isinstance(bits, int | float | None):
                # JSON has no infinity; `JsonLines` writes null instead.
                perplexity = math.inf if m["eval_perplexity"] is None else float(m["eval_perplexity"])
                numbers = {k: float(m[k]) for k in ("eval_loss", "eval_accuracy")}
                found[int(m["step"])] = m | numbers | {"eval_perplexity": perplexity}
    return found


def validation_losses(workdir: Path) -> dict[int, float]:
    """Returns {step: validation loss} of the evaluations so far."""
    found = {}
    for m in _objects(workdir):
        with suppress(ValueError, KeyError, TypeError, OverflowError):
            found[int(m["step"])] = float(m["eval_loss"])
    return found
