"""Stops a loop because a signal asked for it: one process by itself, or several processes after the same step."""

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, Protocol, TypeVar

from jaxlm.host.signals import StopSignal

T = TypeVar("T")
LEFT = "left"  # name of the threads of `unless_asked`, whose work may have been abandoned


class Interrupted(Exception):
    """The work has no result, because the process was asked to stop."""


class Stop(Protocol):
    """Decides whether to stop. Several processes share stop requests through the step's metrics, so that all of them
    stop after the same step.
    """

    def tell(self, batch: Any) -> Any:
        """The batch, with this process's stop request added if there are several processes."""
        ...

    def hear(self, metrics: dict[str, Any]) -> None:
        """Reads from the metrics of a batch whether any process was asked to stop."""
        ...

    def now(self) -> bool:
        """Whether the loop must stop now."""
        ...

    def alone(self, act: Callable[[], T]) -> T:
        """Returns what `act` returns. For an `act` that other processes need not call.

        Raises:
          Interrupted: this process was asked to stop meanwhile; `act` may continue in its own thread.
        """
        ...

    def together(self, act: Callable[[], T]) -> T:
        """Does the same for an `act` with collectives, which all processes call. Several processes always finish it."""
        ...


class Alone:
    """Stops a single process after the step under way. Without a signal, never stops."""

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
    """Stops several processes after the same step.

    A process puts its request into its next batch, of training or of an evaluation. The metrics of that batch, which
    are means over all devices, tell all processes.
    """

    def __init__(self, signal: StopSignal, sharding: Any):
        """Puts both values of the request on the devices.

        Args:
          sharding: of a batch `[local devices, ...]`.
        """
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
    """Returns what `act` returns, or raises Interrupted as soon as a signal arrives, even while XLA compiles.

    So `act` runs in a thread, which is abandoned after a signal. `runtime.leave` can end a process with such a thread.
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
            if done.done():  # `act` itself raised the TimeoutError
                raise
    raise Interrupted
