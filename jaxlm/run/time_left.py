"""Estimates the remaining time of a run: its steps, and the evaluations and saves between them."""

import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

from jaxlm.config import Config


class TimeLeft:
    """Expects each coming evaluation and save to take as long as the last one."""

    def __init__(self, config: Config):
        self._steps = config.steps
        self._periods = {"evaluation": config.eval.every_steps, "save": config.checkpoint.every_steps}
        self._seconds: dict[str, float] = {}

    def timed(self, what: str, act: Callable[[int, Any], None]) -> Callable[[int, Any], None]:
        """Returns the hook with its time measured; `what` is "evaluation" or "save"."""

        def measured(step: int, state: Any) -> None:
            began = time.monotonic()
            act(step, state)
            self._seconds[what] = time.monotonic() - began

        return measured

    def after(self, step: int, step_seconds: float) -> str:
        """Returns the time left after `step`, in words. Before the first evaluation, its duration is unknown."""
        seconds = (self._steps - step) * step_seconds
        for what, period in self._periods.items():
            seconds += self._seconds.get(what, 0.0) * coming(step, self._steps, period)
        unknown = "" if "evaluation" in self._seconds else " without evaluations"
        return f"{duration(seconds)} left{unknown}"


def coming(step: int, steps: int, period: int) -> int:
    """Returns how often a hook is still due after `step`: every `period` steps (0 = never), and after the last step."""
    if step >= steps:
        return 0
    return 1 + ((steps - 1) // period - step // period if period else 0)


def duration(seconds: float) -> str:
    """0:01:30"""
    return str(timedelta(seconds=round(seconds)))
