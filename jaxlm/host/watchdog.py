"""Prints where every host is, and what this process is doing, when training makes no progress for a while."""

import faulthandler
import sys
import threading
import time

from jaxlm.host import distributed


class Watchdog:
    """Checks in a thread, from `start` to `stop`, that the loop still calls `reached`.

    Args:
      seconds: after this time without a call, prints the places of all hosts and the stacks of this process's threads
        to stderr, again after twice the time, and so on. 0 = never. The time before the first call does not count,
        because the step is compiled then.
      abort: whether to end the process, too, with exit code 5.
    """

    def __init__(self, seconds: float, abort: bool = False):
        self._seconds, self._abort = seconds, abort
        self._since: float | None = None  # time of the last call of `reached`, `time.monotonic()`
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def reached(self, step: int, doing: str) -> None:
        """Notes that the loop has reached a place: `doing`, in words, after `step` updates."""
        self._since = time.monotonic()
        distributed.loop_place = f"step {step}, {doing}"

    def _watch(self) -> None:
        last, limit = self._since, self._seconds
        while not self._closed.wait(min(1.0, self._seconds / 4)):
            if self._since != last or last is None:
                last, limit = self._since, self._seconds
            elif time.monotonic() - last > limit:
                self._say(time.monotonic() - last)
                limit *= 2

    def _say(self, seconds: float) -> None:
        """Prints what is known about the hang, and ends the process if `abort` is set."""
        reason = f"nothing has moved for {seconds:.0f} s (log.hang_seconds)"
        where = "; ".join(f"{name}: {place}" for name, place in distributed.places().items())
        print(f"\njaxlm: {reason}. {where}. The stacks of {distributed.own_name()}:", file=sys.stderr, flush=True)
        faulthandler.dump_traceback(sys.stderr)
        if self._abort:
            distributed.end_process(distributed.LOST, f"{reason}; run the same command to resume")

    def start(self) -> None:
        if self._seconds:
            self._thread.start()

    def stop(self) -> None:
        self._closed.set()
        if self._thread.is_alive():
            self._thread.join()
