"""Says where every host is, and what this one is doing, when training has not moved for a while."""

import faulthandler
import sys
import threading
import time

from jaxlm.host import distributed


class Watchdog:
    """From `start` to `stop` a thread looks whether `at` is still called.

    Args:
      seconds: without a call, after which the places of all hosts and the stacks of this process's threads go to
        stderr; again after twice as long, and so on. 0 = never. Counted from the first call: before it, the step is
        compiled.
      abort: the process ends then, with exit code 5.
    """

    def __init__(self, seconds: float, abort: bool = False):
        self._seconds, self._abort = seconds, abort
        self._since: float | None = None  # the last call of `at`
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def at(self, step: int, doing: str) -> None:
        """Says that the loop has come to a place."""
        self._since = time.monotonic()
        distributed.here = f"step {step}, {doing}"

    def _watch(self) -> None:
        said, limit = self._since, self._seconds
        while not self._closed.wait(min(1.0, self._seconds / 4)):
            if self._since != said or said is None:
                said, limit = self._since, self._seconds
            elif time.monotonic() - said > limit:
                self._say(time.monotonic() - said)
                limit *= 2

    def _say(self, seconds: float) -> None:
        reason = f"nothing has moved for {seconds:.0f} s (log.hang_seconds)"
        where = "; ".join(f"{name}: {place}" for name, place in distributed.places().items())
        print(f"\njaxlm: {reason}. {where}. The stacks of {distributed.own_name()}:", file=sys.stderr, flush=True)
        faulthandler.dump_traceback(sys.stderr)
        if self._abort:
            distributed.end(distributed.LOST, f"{reason}; the same command goes on")

    def start(self) -> None:
        if self._seconds:
            self._thread.start()

    def stop(self) -> None:
        self._closed.set()
        if self._thread.is_alive():
            self._thread.join()
