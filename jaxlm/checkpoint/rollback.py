"""Returns to a good checkpoint after training went wrong; the run then leaves out the bad batches.

The second try differs in more than its batches: the learning rates warm up again, to a lower peak if one return soon
follows another. PaLM's authors restarted without the batches around a spike (Chowdhery et al., 2022, section 5.1),
OPT's with a lower rate (Zhang et al., 2022, section 2.5).

`returns.json` in the workdir lists each return, `{"to": step, "batches": [first, last], "why": …, "lr": factor}`. The
run writes it before it continues, so that a run that is killed later makes the same returns again.
"""

import json
import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from jaxlm.config import MAX_INT, UserError
from jaxlm.host.durable import beside, write_whole
from jaxlm.train.schedules import Cut

NAME = "returns.json"
SOON = 1000  # steps; a run that goes back again within so many has not recovered


class Diverged(RuntimeError):
    """Training went wrong and could not recover: exit code 3."""


class Trouble(RuntimeError):
    """Training went wrong in the steps first ... last (counted from 1)."""

    def __init__(self, first: int, last: int, why: str):
        super().__init__(why)
        self.first, self.last, self.why = first, last, why


class Return(NamedTuple):
    to: int  # the step of the checkpoint
    first: int  # number of the first batch that is left out, counted from 1
    last: int  # number of the last one
    why: str
    lr: float = 1.0  # factor on the learning rates from here on; missing in older files


def read(workdir: Path) -> list[Return]:
    """Returns the returns of the run so far. Raises UserError if the file is not as `write` made it."""
    path = workdir / NAME
    if not path.exists():
        return []
    try:
        found = [
            Return(r["to"], r["batches"][0], r["batches"][1], r["why"], r.get("lr", 1.0))
            for r in json.loads(path.read_text("utf-8"))
        ]
        whole = all(type(x) is int for r in found for x in (r.to, r.first, r.last))
        if not whole or not all(0 <= r.to < r.first <= r.last <= MAX_INT and 0 < r.lr <= 1 for r in found):
            raise ValueError("impossible numbers")
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path}: unreadable ({error}); allowed: as a run wrote it") from error
    return found


def write(workdir: Path, returns: Sequence[Return]) -> None:
    content = [{"to": r.to, "batches": [r.first, r.last], "why": r.why, "lr": r.lr} for r in returns]
    write_whole(workdir / NAME, json.dumps(content, indent=2) + "\n")


def lr_scale(returns: Sequence[Return]) -> float:
    """Returns the factor on the learning rates after these returns."""
    return math.prod(r.lr for r in returns)


def lr_cuts(returns: Sequence[Return]) -> tuple[Cut, ...]:
    """Returns the cuts that these returns make in the schedule.

    If a later return goes back further than an earlier one, both cuts take effect at the later return's checkpoint:
    both factors apply there at once, and the rates warm up only once.
    """
    return tuple(Cut(min(later.to for later in returns[i:]), r.lr) for i, r in enumerate(returns))


def recent(returns: Sequence[Return], to: int) -> list[Return]:
    """The returns to checkpoints less than SOON steps before step `to`; the run has not recovered from them."""
    return [r for r in returns if r.to > to - SOON]


def target(steps: Sequence[int], first: int, returns: Sequence[Return]) -> int:
    """Returns the checkpoint to go back to: the newest before the first bad step. If no step was good since the last
    return, it is older than the checkpoint of that return.
    """
    if returns and first <= returns[-1].to + 1:
        first = returns[-1].to
    return max((step for step in steps if step < first), default=min(steps))


def remove(checkpoints: Path, steps: Sequence[int]) -> None:
    """Removes checkpoints. Each is hidden first, so that a kill leaves no part of one that looks whole."""
    for step in sorted(steps, reverse=True):
        hidden = beside(checkpoints / str(step))
        (checkpoints / str(step)).rename(hidden)
        shutil.rmtree(hidden)
