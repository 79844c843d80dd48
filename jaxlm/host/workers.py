"""Processes that work for this one, and end with it.

This module imports little: until a process has imported it, it does not notice that the one that started it has ended.
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

# Semaphores of processes that a signal ended are removed by Python's resource tracker, which would warn about them.
QUIET = "ignore:resource_tracker:UserWarning"


@contextlib.contextmanager
def workers(count: int, begin: Callable[..., object] | None = None, *args: Any) -> Iterator[ProcessPoolExecutor]:
    """Processes that end with this one, at once where it is stopped or fails; each calls `begin` first."""
    others = set(multiprocessing.active_children())
    context = multiprocessing.get_context("spawn")  # a fork of a process with threads may hang
    if QUIET not in sys.warnoptions:
        sys.warnoptions.append(QUIET)
    where = (begin.__module__, begin.__qualname__) if begin else None  # by name: `_begin` imports it later
    with deaf():  # this may start the resource tracker, which unblocks the signals that `signals.block` blocked
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
    """What a function returns in a process of its own."""
    try:
        with workers(1) as pool:
            with no_main(), deaf():
                future = pool.submit(function, *args)
            return future.result()
    except BrokenProcessPool as error:
        raise UserError("a process was killed, as it is when memory runs out; allowed: a smaller corpus") from error


@contextlib.contextmanager
def no_main() -> Iterator[None]:
    """Processes that are started do not import the program: they need nothing of it, and a script without
    `if __name__ == "__main__"` would do again in each what it does.
    """
    program = sys.modules["__main__"]
    sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = program


@contextlib.contextmanager
def deaf() -> Iterator[None]:
    """Processes that are started meanwhile ignore Ctrl-C from their first moment on; they end with this one."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        with signals.starting:
            yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def end_with_parent() -> None:
    """Ends this process when the one that started it ends, even if that is killed."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        connection.wait([parent.sentinel])
        signals.leave(1)

    threading.Thread(target=watch, daemon=True).start()


def _begin(where: tuple[str, str] | None, *args: Any) -> None:
    end_with_parent()
    if where:
        getattr(importlib.import_module(where[0]), where[1])(*args)
