"""Shows the progress of a long job on stderr: a bar on a terminal, otherwise a line at its start and at its end."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import NamedTuple


@cache
def say_once(line: str) -> None:
    """Prints a line on stderr once per process: a program may prepare its data several times."""
    print(line, file=sys.stderr, flush=True)


class Progress(NamedTuple):
    advance: Callable[[int], None]  # takes the number of bytes done since the last call


@contextmanager
def track(what: str, num_bytes: int, show: bool) -> Iterator[Progress]:
    """Shows how much of `num_bytes` (0 if unknown) is done."""
    if not show:
        yield Progress(lambda n: None)
    elif sys.stderr.isatty():
        import rich.console
        import rich.progress as rp

        columns = (
            rp.TextColumn(what),
            rp.BarColumn(),
            rp.DownloadColumn(),
            rp.TransferSpeedColumn(),
            rp.TimeRemainingColumn(),
        )
        with rp.Progress(*columns, console=rich.console.Console(stderr=True)) as bar:
            task = bar.add_task(what, total=num_bytes or None)
            yield Progress(lambda n: bar.update(task, advance=n))
    else:
        start, done = time.monotonic(), 0

        def advance(n: int) -> None:
            nonlocal done
            done += n

        print(f"{what} {_size(num_bytes)}" if num_bytes else what, file=sys.stderr, flush=True)
        yield Progress(advance)
        print(f"{what}: {_size(done)} in {time.monotonic() - start:.1f} s", file=sys.stderr, flush=True)


def _size(num_bytes: int) -> str:
    if num_bytes < 1000:
        return f"{num_bytes} B"
    return f"{num_bytes / 1e6:.1f} MB" if num_bytes >= 1e6 else f"{num_bytes / 1e3:.1f} kB"
