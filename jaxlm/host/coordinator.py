"""The coordinator as a process sees it from outside: whether it listens, and what its loss ends with."""

import contextlib
import ctypes
import os
import signal
import socket
from collections.abc import Callable
from typing import Any


def connect(coordinator: str) -> OSError | None:
    """Tries to connect to the coordinator's address. Returns the error, or None if a process listens there."""
    host, _, port = coordinator.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
    except OSError as error:
        return error
    return None


def at_abort(reason: Callable[[], tuple[str, int] | None]) -> None:
    """Makes an abort of this process end with a last line and an exit code. JAX's C++ code aborts a process that cannot
    join in time or loses the coordinator.

    Args:
      reason: returns the line and the code, or None if the abort has another cause. Then the abort takes its course.
    """

    def aborted(number: int) -> None:
        with contextlib.suppress(BaseException):  # no exception, not even a signal handler's, may reach C++
            if found := reason():
                os.write(2, f"\njaxlm: {found[0]}\n".encode())
                os._exit(found[1])
        ctypes.CDLL(None).signal(signal.SIGABRT, None)  # SIG_DFL: the abort takes its course

    global _abort_handler
    _abort_handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(aborted)
    ctypes.CDLL(None).signal(signal.SIGABRT, _abort_handler)


_abort_handler: Any = None  # keeps the C callback alive
