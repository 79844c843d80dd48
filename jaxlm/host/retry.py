"""Retries after storage errors: the first after one second, each later pause twice as long, up to a minute."""

import time
from collections.abc import Callable

FIRST, LONGEST = 1.0, 60.0  # the first and the longest pause, seconds
PATIENCE = 60.0  # seconds after which `insist`, used at the end of a run, gives up


class Pause:
    """The time until the next try, for work that continues meanwhile and asks whether it is over."""

    def __init__(self) -> None:
        self.end()

    def end(self) -> None:
        """Call when a try succeeds."""
        self._next, self._until = FIRST, 0.0

    def begin(self) -> float:
        """Call when a try fails. Returns the seconds until the next one."""
        seconds, self._next = self._next, min(2 * self._next, LONGEST)
        self._until = time.monotonic() + seconds
        return seconds

    @property
    def failing(self) -> bool:
        """Whether the last try failed."""
        return self._until > 0

    @property
    def over(self) -> bool:
        """Whether it is time for the next try."""
        return time.monotonic() >= self._until


def insist(act: Callable[[], None], agreed: Callable[[bool], bool] = bool) -> None:
    """Calls `act` until it succeeds, with pauses. Raises its last error after PATIENCE seconds.

    Args:
      agreed: whether to give up, given whether PATIENCE is over. Processes that act together agree on it here.
    """
    deadline, pause = time.monotonic() + PATIENCE, Pause()
    while True:
        try:
            return act()
        except Exception:
            if agreed(time.monotonic() >= deadline):
                raise
            time.sleep(max(0.0, min(pause.begin(), deadline - time.monotonic())))
