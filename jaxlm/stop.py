"""Stopping by a signal: at once before training has begun, and after the step under way from then on.

Nothing here imports jax at module level, so that a program can be stopped while it starts.
"""

import signal
from typing import Any

EXIT_CODE = 75


class Stopped(BaseException):
    """A signal came before there was anything to save; like KeyboardInterrupt, no `except Exception` catches it."""


class StopSignal:
    """SIGTERM or SIGINT. A second one ends the process at once."""

    AGREE_EVERY = 10  # steps; with several processes, all must stop after the same one

    def __init__(self) -> None:
        self._received = self._deferred = False
        self.listen()

    def listen(self) -> None:
        """Takes the signals; again after `jax.distributed.initialize`, which takes SIGTERM for itself."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._receive)

    def _receive(self, number: int, frame: Any) -> None:
        self._received = True
        for other in (signal.SIGTERM, signal.SIGINT):
            signal.signal(other, signal.SIG_DFL)
        if not self._deferred:
            raise Stopped

    def defer(self) -> None:
        """From now on a signal is only noted: whoever asks `agreed` stops, and saves."""
        self._deferred = True

    def agreed(self, step: int) -> bool:
        """Whether all processes are to stop after `step` updates."""
        import jax
        import numpy as np
        from jax.experimental import multihost_utils

        if jax.process_count() == 1:
            return self._received
        if step % self.AGREE_EVERY:
            return False
        return bool(multihost_utils.process_allgather(np.array(self._received)).any())
