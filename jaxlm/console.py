"""What a person sees: a line of facts, progress, evaluations, the comparison at the end."""

import time
from datetime import timedelta
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

PLAIN_SECONDS = 5.0  # between two progress lines where there is no terminal


class Reporter:
    """Progress as a bar on a terminal, as plain lines elsewhere. A process that is not the first one says nothing."""

    def __init__(self, steps: int, start: int, quiet: bool = False):
        self.console = Console(quiet=quiet, highlight=False, soft_wrap=True, emoji=False)
        self._steps, self._last_line, self._estimated = steps, 0.0, False
        self._bar = Progress(
            TextColumn("step {task.completed:,.0f}/{task.total:,.0f}"), BarColumn(), TextColumn("{task.fields[text]}"),
            TimeRemainingColumn(), console=self.console, disable=not self.console.is_terminal or quiet, transient=True,
            refresh_per_second=4,  # drawing takes time from the step on a CPU
        )  # fmt: skip
        self._task = self._bar.add_task("train", total=steps, completed=start, text="compiling …")

    def say(self, text: str) -> None:
        self.console.print(text, markup=False)

    def start(self) -> None:
        if self.console.is_terminal:
            self._bar.start()

    def stop(self) -> None:
        self._bar.stop()

    def progress(self, step: int) -> None:
        if self.console.is_terminal:
            self._bar.update(self._task, completed=step)

    def train(self, m: dict[str, Any]) -> None:
        mfu = "" if m["mfu"] is None else f" · MFU {m['mfu']:.1%}"
        rate = f" · {human(m['tokens_per_second'])} tokens/s{mfu}" if m["step"] > 1 else ""  # the first is compilation
        text = f"loss {m['loss']:.4f}{rate}"
        if self.console.is_terminal:
            self._bar.update(self._task, completed=m["step"], text=text)
        elif time.monotonic() - self._last_line > PLAIN_SECONDS or m["step"] in (1, self._steps):
            self._last_line = time.monotonic()
            left = "" if m["step"] in (1, self._steps) else f" · {self._left(m)} left"  # the first step is compilation
            numbers = f"lr {m['lr']:.2e} · grad norm {m['grad_norm']:.3f}"
            self.say(f"step {m['step']:>6}/{self._steps} · {text} · {numbers}{left}")
        if not self._estimated and m["step"] not in (1, self._steps):
            self._estimated = True
            self.say(f"{m['step_seconds'] * 1e3:.3g} ms a step: about {self._left(m)} of training to go")

    def _left(self, m: dict[str, Any]) -> str:
        seconds = (self._steps - m["step"]) * m["step_seconds"]
        return str(timedelta(seconds=round(seconds)))

    def evaluation(self, m: dict[str, Any], sample: str | None) -> None:
        bits = m["eval_bits_per_byte"]
        score = "" if bits is None else f" · {bits:.4f} bits per byte"
        self.say(
            f"step {m['step']:>6}/{self._steps} · validation loss {m['eval_loss']:.4f}{score}"
            f" · perplexity {m['eval_perplexity']:.2f} · accuracy {m['eval_accuracy']:.1%}"
        )
        if sample is not None:
            lines = "".join(c if c.isprintable() or c == "\n" else "�" for c in sample.expandtabs(4)).split("\n")
            self.say("\n".join("    │ " + line for line in lines))

    def comparison(self, baselines: dict[str, float], bits: float) -> None:
        """How many bits each needs for a byte of the held-out text."""
        table = Table("on the same held-out bytes", "bits per byte", box=None)
        for name, value in sorted([*baselines.items(), ("this model", bits)], key=lambda row: -row[1]):
            table.add_row(name, f"{value:.3f}", style="bold" if name == "this model" else None)
        self.console.print(table)


def human(number: float) -> str:
    """12.3k, 4.56M, 7.89B"""
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return f"{number:.3g}"
