"""Stopping by a signal: at once before training has begun, and after the step under way from then on.

Nothing here imports jax at module level, so that a program can be stopped while it starts.
"""

import signal
from typing import Any, Protocol

EXIT_CODE = 75


class Stopped(BaseException):
    """A signal came before there was anything to save; like KeyboardInterrupt, no `except Exception` catches it."""


class StopSignal:
    """SIGTERM or SIGINT. A second one ends the process at once."""

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
        """From now on a signal is only noted: who asks `received` stops, and saves."""
        self._deferred = True

    @property
    def received(self) -> bool:
        return self._received


class Stop(Protocol):
    """Whether to stop, which processes tell each other by way of what they compute together: all learn it at the same
    place.
    """

    def tell(self, batch: Any) -> Any:
        """The batch with what this process has been asked."""
        ...

    def hear(self, metrics: dict[str, Any]) -> None:
        """Learns from the numbers of a batch what any has been asked."""
        ...

    def now(self) -> bool: ...


class Alone:
    """Stops one process after the step under way; never, without a signal."""

    def __init__(self, signal: StopSignal | None):
        self._signal = signal

    def tell(self, batch: Any) -> Any:
        return batch

    def hear(self, metrics: Any) -> None:
        pass

    def now(self) -> bool:
        return self._signal is not None and self._signal.received


class Together:
    """Stops several processes after the same step: what one was asked goes into its next step, or evaluation's batch,
    whose metrics, over all devices, tell it to all of them at the same place of their loops.
    """

    def __init__(self, signal: StopSignal, sharding: Any):
        """Args: sharding: of a batch [local devices, ...]."""
        import jax
        import numpy as np

        self._signal, self._heard = signal, False
        count = sharding.mesh.size
        self._asked = [jax.device_put(np.full(count, flag, np.float32), sharding) for flag in (0, 1)]

    def tell(self, batch: Any) -> Any:
        return batch | {"stop": self._asked[self._signal.received]}

    def hear(self, metrics: Any) -> None:
        self._heard |= bool(metrics["stop"] > 0)

    def now(self) -> bool:
        return self._heard


NEVER: Stop = Alone(None)


def make_stop(signal: StopSignal, sharding: Any) -> Stop:
    import jax

    return Alone(signal) if jax.process_count() == 1 else Together(signal, sharding)
