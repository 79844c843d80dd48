"""When to try again what the storage refuses: after a second, then after twice as long each time, a minute at most."""

import time
from collections.abc import Callable

FIRST, LONGEST = 1.0, 60.0  # seconds
PATIENCE = 60.0  # seconds for which the end of a run tries


class Pause:
    """Between the tries of something that goes on meanwhile."""

    def __init__(self) -> None:
        self.end()

    def end(self) -> None:
        """It succeeded."""
        self._next, self._until = FIRST, 0.0

    def begin(self) -> float:
        """It failed; gives the seconds until the next try."""
        seconds, self._next = self._next, min(2 * self._next, LONGEST)
        self._until = time.monotonic() + seconds
        return seconds

    @property
    def failing(self) -> bool:
        """Whether the last try failed."""
        return self._until > 0

    @property
    def over(self) -> bool:
        """Whether it may be tried."""
        return time.monotonic() >= self._until


def insist(act: Callable[[], None], agreed: Callable[[bool], bool] = bool) -> None:
    """Acts, and waits and acts again while that raises; the last error is raised.

    Args:
      agreed: whether to give up, given whether it is time; for several processes that act together.
    """
    deadline, pause = time.monotonic() + PATIENCE, Pause()
    while True:
        try:
            return act()
        except Exception:
            if agreed(time.monotonic() >= deadline):
                raise
            time.sleep(max(0.0, min(pause.begin(), deadline - time.monotonic())))
