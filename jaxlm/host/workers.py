"""Worker processes that end when the process that started them ends.

This module imports little, because a worker notices the end of its parent only after importing it.
"""

import contextlib
import importlib
import multiprocessing
import signal
import sys
import threading
import types
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import connection
from typing import Any, TypeVar

from jaxlm.config import UserError
from jaxlm.host import signals

T = TypeVar("T")

# Python's resource tracker removes the semaphores of processes that a signal ended, and would warn about them.
QUIET = "ignore:resource_tracker:UserWarning"


@contextlib.contextmanager
def workers(count: int, begin: Callable[..., object] | None = None, *args: Any) -> Iterator[ProcessPoolExecutor]:
    """A pool of `count` worker processes. They end with this process, at once if it is stopped or fails.

    Args:
      begin, args: each worker first calls `begin(*args)`.
    """
    others = set(multiprocessing.active_children())
    context = multiprocessing.get_context("spawn")  # a forked process may hang if its parent has threads
    if QUIET not in sys.warnoptions:
        sys.warnoptions.append(QUIET)
    where = (begin.__module__, begin.__qualname__) if begin else None  # a name, which `_begin` imports later
    with deaf():  # this may start Python's resource tracker, which unblocks what `signals.block` blocked
        pool = ProcessPoolExecutor(count, mp_context=context, initializer=_begin, initargs=(where, *args))
    try:
        yield pool
        pool.shutdown()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        for process in set(multiprocessing.active_children()) - others:
            process.kill()
            process.join()


def apart(function: Callable[..., T], *args: Any) -> T:
    """Runs a function in a process of its own, and returns its result.

    Raises:
      UserError: the process was killed.
    """
    try:
        with workers(1) as pool:
            with no_main(), deaf():
                future = pool.submit(function, *args)
            return future.result()
    except BrokenProcessPool as error:
        raise UserError("a process was killed, probably out of memory; allowed: a smaller corpus") from error


@contextlib.contextmanager
def no_main() -> Iterator[None]:
    """A context in which new processes do not import the main program. They need nothing from it, and a script without
    `if __name__ == "__main__"` would run again in each of them.
    """
    program = sys.modules["__main__"]
    sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = program


@contextlib.contextmanager
def deaf() -> Iterator[None]:
    """A context in which new processes ignore Ctrl-C from their first moment on, because they end with this process."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        with signals.starting:
            yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def end_with_parent() -> None:
    """From now on, this process ends when its parent ends, even if the parent is killed."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        connection.wait([parent.sentinel])
        signals.leave(1)

    threading.Thread(target=watch, daemon=True).start()


def _begin(where: tuple[str, str] | None, *args: Any) -> None:
    """The first call of each worker; `where` is the module and the name of a function to call with `args`."""
    end_with_parent()
    if where:
        getattr(importlib.import_module(where[0]), where[1])(*args)
