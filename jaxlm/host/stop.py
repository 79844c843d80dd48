"""When a loop stops because the program was asked to: one process alone, or several after the same step."""

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, Protocol, TypeVar

from jaxlm.host.signals import StopSignal

T = TypeVar("T")
LEFT = "left"  # the name of threads whose work may have been left


class Interrupted(Exception):
    """The work was asked to stop, and has no result."""


class Stop(Protocol):
    """Whether to stop. Processes share stop requests through the step's metrics, so all stop after the same step."""

    def tell(self, batch: Any) -> Any:
        """The batch, with this process's stop request."""
        ...

    def hear(self, metrics: dict[str, Any]) -> None:
        """Reads from the metrics of a batch whether any process was asked to stop."""
        ...

    def now(self) -> bool: ...

    def alone(self, act: Callable[[], T]) -> T:
        """Returns what `act` returns, which other processes need not call too.

        Raises:
          Interrupted: this process was asked to stop meanwhile; `act` may go on in a thread of its own.
        """
        ...

    def together(self, act: Callable[[], T]) -> T:
        """The same for an `act` with collectives, which all processes call: several processes always finish it."""
        ...


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

    def alone(self, act: Callable[[], T]) -> T:
        return act() if self._signal is None else unless_asked(self._signal, act)

    def together(self, act: Callable[[], T]) -> T:
        return self.alone(act)


class Together:
    """Stops several processes after the same step. A request goes into the process's next batch, of training or of an
    evaluation; the metrics of that batch, which are means over all devices, tell it to all processes.
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

    def alone(self, act: Callable[[], T]) -> T:
        return unless_asked(self._signal, act)

    def together(self, act: Callable[[], T]) -> T:
        return act()


NEVER: Stop = Alone(None)


def make_stop(signal: StopSignal, sharding: Any) -> Stop:
    import jax

    return Alone(signal) if jax.process_count() == 1 else Together(signal, sharding)


def unless_asked(signal: StopSignal, act: Callable[[], T]) -> T:
    """Returns what `act` returns, or raises Interrupted as soon as a signal comes, even while XLA compiles for minutes.

    `act` therefore runs in a thread, which is left to itself then. `runtime.leave` ends a process with such a thread.
    """
    if signal.received:
        raise Interrupted
    done: Future[T] = Future()

    def work() -> None:
        try:
            done.set_result(act())
        except BaseException as error:
            done.set_exception(error)

    threading.Thread(target=work, name=LEFT, daemon=True).start()
    while not signal.received:
        try:
            return done.result(timeout=0.1)
        except TimeoutError:
            if done.done():  # it is the act's own
                raise
    raise Interrupted
