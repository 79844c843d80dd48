"""The console of a run: training lines, progress, evaluations, and the comparison at the end."""

import time
from typing import Any

from rich.table import Table

from jaxlm.config import Config
from jaxlm.run.phases import Phases
from jaxlm.run.time_left import TimeLeft

PLAIN_SECONDS = 5.0  # between two training lines if there is no terminal


class Reporter(Phases):
    """Shows a run. Only the first process prints."""

    def __init__(self, config: Config, quiet: bool = False):
        super().__init__(quiet)
        self.left = TimeLeft(config)
        self._steps, self._last_line, self._estimated = config.steps, 0.0, False
        self._task = self.bar.add_task("", total=config.steps, text="", visible=False)

    def start(self, step: int) -> None:
        """Shows the progress bar of the steps, of which `step` are done."""
        self.bar.update(self._task, visible=True)
        self.progress(step)
        if self.live:
            self.bar.start()

    def stop(self) -> None:
        self.bar.update(self._task, visible=False)
        self.bar.stop()

    def progress(self, step: int) -> None:
        if self.live:
            self.bar.update(self._task, completed=step, description=f"step {step:,}/{self._steps:,}")

    def train(self, m: dict[str, Any]) -> None:
        """Shows a training line. Its loss is the mean since the previous line of metrics.jsonl."""
        mfu = "" if m["mfu"] is None else f" · MFU {m['mfu']:.1%}"
        # Without the speed of the first step, which includes compilation.
        rate = f" · {human(m['tokens_per_second'])} tokens/s{mfu}" if m["step"] > 1 else ""
        text, timed = f"loss {m['loss_mean']:.4f}{rate}", m["step"] not in (1, self._steps)
        left = self.left.after(m["step"], m["step_seconds"])
        if self.live:
            self.bar.update(self._task, text=f"{text} · {left}" if timed else text)
        elif time.monotonic() - self._last_line > PLAIN_SECONDS or not timed:
            self._last_line = time.monotonic()
            numbers = f"lr {m['lr']:.2e} · grad norm {m['grad_norm']:.3f}"
            self.say(f"step {m['step']:>6}/{self._steps} · {text} · {numbers}{f' · {left}' if timed else ''}")
        if not self._estimated and timed:
            self._estimated = True
            self.say(f"{m['step_seconds'] * 1e3:.3g} ms a step: about {left}")

    def evaluation(self, m: dict[str, Any]) -> None:
        """Shows the scores of an evaluation, and its sample of text if there is one."""
        bits, sample = m["eval_bits_per_byte"], m.get("sample")
        score = "" if bits is None else f" · {bits:.4f} bits per byte"
        self.say(
            f"step {m['step']:>6}/{self._steps} · validation loss {m['eval_loss']:.4f}{score}"
            f" · perplexity {m['eval_perplexity']:.2f} · accuracy {m['eval_accuracy']:.1%}"
        )
        if sample is not None:
            lines = "".join(c if c.isprintable() or c == "\n" else "�" for c in sample.expandtabs(4)).split("\n")
            self.say("\n".join("    │ " + line for line in lines), clock=False)

    def comparison(self, baselines: dict[str, float], bits: float) -> None:
        """Shows how many bits the model and the compressors need for a byte of the held-out text."""
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
