"""SIGINT and SIGTERM: who hears them, and how they end a program.

Both are blocked in every thread, and one thread waits for them. Python would run a signal handler in the main thread,
between two bytecodes: late where that thread is inside XLA for minutes, and an exception from a handler is lost where
Python swallows exceptions (`__del__`, callbacks of the garbage collector).

That thread ends the process by `os._exit`, since destructors that run beside XLA's threads crash. So files must always
be as safe as after `kill -9`; `at_stop` takes what should be tidied up all the same.

This module imports nothing that takes time: a program calls `block` before its other imports.
"""

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import NoReturn

NUMBERS = (signal.SIGINT, signal.SIGTERM)
SAME = 0.2  # seconds in which a second signal is still the first one: `timeout` sends to the process and to its group
TIDY, FLUSH = 1.4, 0.4  # seconds for what `at_stop` was given, and for what stdout still holds: it may be a full pipe
BEFORE = "stopped before the first step; run the same command again"


class StopSignal:
    """A signal ends the program at once, with exit code `code` and one line on stderr. After `defer` the first one is
    only noted, and a second one ends the program.
    """

    def __init__(self, code: int = 75, line: str = f"jaxlm: {BEFORE}"):
        self._code, self._line = code, line
        self._deferred, self._noted_at = False, 0.0
        self._noted = threading.Event()
        self._lock = threading.RLock()  # held until the process is gone, once it is to end

    @property
    def received(self) -> bool:
        return self._noted.is_set()

    def receive(self) -> None:
        """Does what a signal asks for."""
        with self._lock:
            if not self._deferred:
                self.end(self._line)
            elif not self.received:
                self._noted_at = time.monotonic()
                self._noted.set()
            elif time.monotonic() - self._noted_at > SAME:
                self.end("jaxlm: stopped by a second signal; the same command goes on from the newest checkpoint")

    def defer(self) -> None:
        """From now on a signal is only noted: the loop reads `received`, saves and stops."""
        if not self._deferred:
            with self._lock:
                self._deferred = True

    def release(self, why: str = BEFORE) -> None:
        """From now on a signal ends the program at once, and so does one that was noted before."""
        with self._lock:
            self._deferred, self._line = False, f"jaxlm: {why}"
            if self.received:
                self.end(self._line)

    def settle(self) -> None:
        """Waits for ever if a signal is ending the program, so that errors which that causes are not reported."""
        with self._lock:
            pass

    def end(self, line: str) -> None:
        """Prints the line, tidies up and ends the process."""
        try:
            show_cursor = "\x1b[?25h\n" if os.isatty(2) else ""  # a progress bar hides it
            os.write(2, f"{show_cursor}{line}\n".encode())
            _within(TIDY, _tidy)
            _within(FLUSH, sys.stdout.flush)
        finally:
            leave(self._code)


starting = threading.Lock()  # held while a process is started, which prints a traceback if this one ends meanwhile


def leave(code: int) -> NoReturn:
    """Ends this process at once."""
    starting.acquire(timeout=1)
    os._exit(code)


_stop: StopSignal | None = None  # of a program; a library leaves signals to those who use it
_acts: list[Callable[[], object]] = []


def block() -> None:
    """Holds both signals back until `listen`, even if another program replaces this one (`os.execv`) before that."""
    signal.pthread_sigmask(signal.SIG_BLOCK, NUMBERS)


def listen(code: int, line: str) -> None:
    """Call after `block`: from now on a signal ends the program, with this exit code and line."""
    global _stop
    stop = _stop = StopSignal(code, line)
    for number in NUMBERS:  # in case a library unblocks them in one of its threads
        signal.signal(number, lambda number, frame: stop.receive())
    threading.Thread(target=_wait, args=(stop,), name="signals", daemon=True).start()


def _wait(stop: StopSignal) -> None:
    while True:
        signal.sigwait(NUMBERS)
        stop.receive()


def of_program() -> StopSignal:
    """The program's stop signal; if the program does not listen, one that never comes."""
    return _stop or StopSignal()


def at_stop(act: Callable[[], object]) -> None:
    """A signal that ends the program calls `act` first, in another thread, unless `forget` was called."""
    _acts.append(act)


def forget(act: Callable[[], object]) -> None:
    """The opposite of `at_stop`."""
    _acts.remove(act)


def settle() -> None:
    of_program().settle()


def _tidy() -> None:
    for act in reversed(_acts):
        with contextlib.suppress(Exception):  # the others are to be called too
            act()


def _within(seconds: float, act: Callable[[], object]) -> None:
    """Runs `act` in a thread, and waits for it no longer than that."""

    def work() -> None:
        with contextlib.suppress(OSError, ValueError):  # stdout is closed
            act()

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(seconds)
