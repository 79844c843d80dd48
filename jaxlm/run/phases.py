"""Progress on the console: bars on a terminal, elsewhere lines that begin with date and time."""

import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from jaxlm.run.time_left import duration

LONG = 10.0  # seconds after which a phase gets a line if there is no terminal


class Phases:
    """Prints lines, and shows phases such as compiling and evaluating."""

    def __init__(self, quiet: bool = False, stderr: bool = False):
        self.console = Console(quiet=quiet, stderr=stderr, highlight=False, soft_wrap=True, emoji=False)
        self.live = self.console.is_terminal and not quiet
        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[text]}"),
            TimeElapsedColumn(),
            console=self.console,
            disable=not self.live,
            transient=True,
            refresh_per_second=4,  # on a CPU, drawing takes time from the step
        )

    def say(self, text: str, clock: bool = True) -> None:
        """Prints lines, with date and time if they go into a file."""
        now = time.strftime("%Y-%m-%d %H:%M:%S ") if clock and not self.console.is_terminal else ""
        self.console.print(now + text, markup=False)

    @contextmanager
    def phase(self, what: str, total: int | None = None, ended: str = "") -> Iterator[Callable[[], None]]:
        """Shows a phase while it lasts. Yields a function to call after each of its `total` parts.

        Without a terminal, a phase gets lines only if it takes long, or if `ended`, a word for its end, is given.
        """
        began, done, over = time.monotonic(), 0, threading.Event()

        def text() -> str:
            if not total or not done:
                return ""
            left = (time.monotonic() - began) / done * max(total - done, 0)
            return f"{done} of {total} · {duration(left)} left"

        def advance() -> None:
            nonlocal done
            done += 1
            self.bar.update(task, completed=done, text=text())

        def lines() -> None:
            wait = LONG
            while not over.wait(wait):
                self.say(f"{what}: {text() or duration(time.monotonic() - began) + ' so far'}")
                wait *= 2

        alone = self.live and not self.bar.live.is_started
        if alone:
            self.bar.start()
        task = self.bar.add_task(what, total=total, text="")
        if ended and not self.live:
            self.say(f"{what} …")
        teller = threading.Thread(target=lines, name="phase", daemon=True)
        if not (self.console.is_terminal or self.console.quiet):
            teller.start()
        try:
            yield advance
        finally:
            over.set()
            if teller.ident:
                teller.join()
            self.bar.remove_task(task)
            if alone:
                self.bar.stop()
        seconds = time.monotonic() - began
        if not self.console.is_terminal and (ended or seconds > LONG):
            self.say(f"{ended or what + ': done'} in {seconds:.1f} s")


def counted(items: Iterable[Any], advance: Callable[[], None]) -> Iterator[Any]:
    """Yields the items, and calls `advance` when the next one is requested."""
    for item in items:
        yield item
        advance()
