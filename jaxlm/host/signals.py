"""How SIGINT and SIGTERM are received, and how they end a program.

All threads block both signals, and one thread waits for them. An ordinary Python signal handler runs in the main
thread, between two bytecodes. It would run late while that thread is inside XLA for minutes, and its exception would be
lost where Python swallows exceptions (`__del__`, callbacks of the garbage collector).

The thread ends the process by `os._exit`, because destructors that run beside XLA's threads crash. So files must always
be as safe as after `kill -9`. `at_stop` registers what should be tidied up all the same.

This module imports nothing that takes time, because a program calls `block` before its other imports.
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
SAME = 0.2  # seconds in which a second signal counts as the first: `timeout` signals the process and its group
TIDY, FLUSH = 1.4, 0.4  # seconds at most for the functions of `at_stop`, and to flush stdout, which may be a full pipe
BEFORE = "stopped before the first step; run the same command again"


class StopSignal:
    """Decides what a signal does.

    At first, a signal ends the program at once, with exit code `code` and `line` on stderr. After `defer`, the first
    signal is only noted, and a second one ends the program.
    """

    def __init__(self, code: int = 75, line: str = f"jaxlm: {BEFORE}"):
        self._code, self._line = code, line
        self._deferred, self._noted_at = False, 0.0
        self._noted = threading.Event()
        self._lock = threading.RLock()  # a thread that ends the process never releases it

    @property
    def received(self) -> bool:
        """Whether a signal has been noted."""
        return self._noted.is_set()

    def receive(self) -> None:
        """Handles a signal: notes it or ends the program."""
        with self._lock:
            if not self._deferred:
                self.end(self._line)
            elif not self.received:
                self._noted_at = time.monotonic()
                self._noted.set()
            elif time.monotonic() - self._noted_at > SAME:
                self.end("jaxlm: stopped by a second signal; run the same command to resume from the newest checkpoint")

    def defer(self) -> None:
        """From now on, a first signal is only noted: the loop reads `received`, saves and stops."""
        if not self._deferred:
            with self._lock:
                self._deferred = True

    def release(self, why: str = BEFORE) -> None:
        """From now on, a signal ends the program at once. Ends it now if a signal was noted before.

        Args:
          why: text of the line that is printed then.
        """
        with self._lock:
            self._deferred, self._line = False, f"jaxlm: {why}"
            if self.received:
                self.end(self._line)

    def settle(self) -> None:
        """Waits forever if a signal is ending the program, so that no errors are reported that the end causes."""
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


starting = threading.Lock()  # held while a child process starts: it prints a traceback if this process ends meanwhile


def leave(code: int) -> NoReturn:
    """Ends this process at once, or within a second if a child process is just starting."""
    starting.acquire(timeout=1)
    os._exit(code)


_stop: StopSignal | None = None  # set by `listen`; None where jaxlm is used as a library, which leaves signals alone
_acts: list[Callable[[], object]] = []  # from `at_stop`


def block() -> None:
    """Holds both signals back until `listen`, also across an `os.execv` that restarts the program before that."""
    signal.pthread_sigmask(signal.SIG_BLOCK, NUMBERS)


def listen(code: int, line: str) -> None:
    """From now on, a signal ends the program with this exit code and line. Call it after `block`."""
    global _stop
    stop = _stop = StopSignal(code, line)
    for number in NUMBERS:  # for threads in which a library unblocks the signals
        signal.signal(number, lambda number, frame: stop.receive())
    threading.Thread(target=_wait, args=(stop,), name="signals", daemon=True).start()


def _wait(stop: StopSignal) -> None:
    """Passes on signals, forever."""
    while True:
        signal.sigwait(NUMBERS)
        stop.receive()


def of_program() -> StopSignal:
    """The program's stop signal, or, if the program does not call `listen`, one that never arrives."""
    return _stop or StopSignal()


def at_stop(act: Callable[[], object]) -> None:
    """Registers `act`: a signal that ends the program calls it first, in another thread, unless `forget` removes it."""
    _acts.append(act)


def forget(act: Callable[[], object]) -> None:
    """Removes what `at_stop` registered."""
    _acts.remove(act)


def settle() -> None:
    """Waits forever if a signal is ending the program."""
    of_program().settle()


def _tidy() -> None:
    """Calls what `at_stop` registered, the latest first."""
    for act in reversed(_acts):
        with contextlib.suppress(Exception):  # an error must not keep the others from being called
            act()


def _within(seconds: float, act: Callable[[], object]) -> None:
    """Runs `act` in a thread, and waits for it at most `seconds`."""

    def work() -> None:
        with contextlib.suppress(OSError, ValueError):  # stdout is closed
            act()

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(seconds)
