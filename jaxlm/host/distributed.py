"""Several hosts as one run: what they must agree on, and how they notice that one of them is gone.

JAX's coordination service runs in the first process. It has a table of strings that all processes read and write:

    jaxlm/ROUND/WHAT/PROCESS  a value of this process, such as its host's name, that the others wait for
    jaxlm/beat/PROCESS        a count that the process increments every second, and the place of its loop in words
    jaxlm/end/PROCESS         written when the process ends: its exit code, and the reason if it ends early

A process that finds that another one has ended early, or has not counted for LOST_AFTER seconds, prints a line about it
and ends, too. Otherwise it would wait for the other one in a collective forever. When the first process is gone, its
table cannot be read any more, and all others end in the same way. join.py connects the processes.
"""

import contextlib
import json
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from typing import Any

from jaxlm.config import UserError
from jaxlm.host import signals
from jaxlm.host.coordinator import at_abort, connect
from jaxlm.host.startup import STOPPED

LOST = 5  # exit code: another host is gone; the same command resumes the run
LOST_AFTER = 30  # seconds without a sign of life after which a process counts as gone; JAX itself takes 100
FAILED_AFTER = 10  # replaces LOST_AFTER once a collective has failed
WATCH_EVERY = 0.5  # seconds between two looks at the others
JOIN_LIMIT = 300  # seconds within which all processes must join, unless JAXLM_JOIN_SECONDS sets another limit
PREPARE_LIMIT = 12 * 3600  # seconds to wait for a host that prepares its data; one that dies is found by LOST_AFTER
PATIENCE = 10  # seconds of waiting after which a line says for whom


class Hosts:
    """The processes of this run as one of them sees them, after `join`.

    Three threads watch over the run: `_beat` shows the others that this process lives, `_watch` looks for others that
    are gone, and `_guard` notices when the coordinator, and with it the table, is gone.
    """

    def __init__(self) -> None:
        from jax._src import distributed

        state = distributed.global_state
        self._client: Any = state.client
        self.index, self.count = state.process_id, state.num_processes
        self._round = 0  # number of exchanges so far, the same on all hosts: they make the same ones in the same order
        self._told: list[str] = []  # keys of this host's values that others may still have to read
        self.names: list[str] = []
        self.names = self._exchange("the name", socket.gethostname(), JOIN_LIMIT)
        self._coordinator: str = state.coordinator_address or ""
        self._gone = f"{self.name(0)}, the coordinator at {self._coordinator}, is gone"
        self._ending = self._failed = False
        self._unanswered = 0  # seconds since `_watch` last read the table
        for act in (self._beat, self._watch, self._guard):
            threading.Thread(target=act, daemon=True).start()
        at_abort(lambda: None if self._reachable() else (f"{self._gone}; {self._advice(LOST)}", LOST))

    def name(self, index: int) -> str:
        """How messages call a process."""
        return f"host {self.names[index]} (process {index})" if self.names else f"process {index}"

    def check_same(self, what: str, values: dict[str, Any]) -> None:
        """Raises UserError, the same on all hosts, unless all of them call this with the same values."""
        found = [json.loads(v) for v in self._exchange(what, json.dumps(values), PREPARE_LIMIT)]
        for i, other in enumerate(found):
            for key in found[0] | other:
                if other.get(key) != found[0].get(key):
                    raise UserError(
                        f"{what}: {key} is {other.get(key)!r} on {self.name(i)} and {found[0].get(key)!r} on"
                        f" {self.name(0)}; allowed: the same on all hosts"
                    )

    def from_first(self, what: str, value: Callable[[], str]) -> str:
        """The first process computes the value; every process returns it."""
        self._round += 1
        if self.index == 0:
            found = value()
            self._tell(what, found)
            return found
        return self._get(what, 0, time.monotonic() + PREPARE_LIMIT)

    def from_all(self, what: str, value: str) -> list[str]:
        """The values of all processes, in their order."""
        return self._exchange(what, value, PREPARE_LIMIT)

    def run(self, program: Callable[[], int], exit_code: Callable[..., int]) -> int:
        """Runs the program, tells the others its exit code, and returns the code.

        If the program fails, the process ends here at once, because JAX's own exit would wait for the others.

        Args:
          exit_code: `exit_codes.exit_code`.
        """
        lines: list[str] = []  # why the program failed

        def watched() -> int:
            try:
                return program()
            except Exception as error:
                if "JaxRuntimeError" in type(error).__name__:
                    # A collective fails at once if the network reports that its other end is gone. `_watch` then finds
                    # out who that is, and ends this process. If it does not, the error has another cause.
                    self._failed = True
                    time.sleep(FAILED_AFTER + 5)
                raise

        try:
            code = exit_code(watched, said=lines)
        except Exception:
            code = 1
            lines.append("a bug, see its traceback")
            traceback.print_exc()
        self._ending = True
        with contextlib.suppress(Exception):  # the coordinator may be gone
            self._client.key_value_set(f"jaxlm/end/{self.index}", json.dumps([code, *lines]))
        if code not in (0, STOPPED):
            self._let_read()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
        return code

    def _exchange(self, what: str, value: str, limit: int) -> list[str]:
        """The values of all processes, in their order. Waits for late ones, in total at most `limit` seconds."""
        self._round += 1
        read = self._told.copy()  # of earlier rounds; a process that tells its value of this round has read them all
        self._tell(what, value)
        deadline = time.monotonic() + limit
        found = [self._get(what, i, deadline) for i in range(self.count)]
        for key in read:
            self._client.key_value_delete(key)
            self._told.remove(key)
        return found

    def _tell(self, what: str, value: str) -> None:
        self._told.append(self._key(what, self.index))
        self._client.key_value_set(self._told[-1], value)

    def _key(self, what: str, process: int) -> str:
        return f"jaxlm/{self._round}/{what}/{process}"

    def _get(self, what: str, process: int, deadline: float) -> str:
        """Waits for a process's value of this round. Raises UserError at the deadline."""
        # Only one host prints that it waits: the first, or, if the first is late, the second.
        announced = self.index != (process == 0)
        while True:
            began = time.monotonic()
            try:
                return self._client.blocking_key_value_get(self._key(what, process), 1000 * PATIENCE)
            except Exception as error:
                left = deadline - time.monotonic()
                if left <= 0:
                    raise UserError(f"{what} of {self.name(process)} did not arrive in time") from error
                if not announced:
                    minutes = max(1, round(left / 60))
                    print(f"jaxlm: waiting for {what} of {self.name(process)}, {minutes} min at most", file=sys.stderr)
                    announced = True
                time.sleep(max(0.0, began + 1 - time.monotonic()))  # without a coordinator, the call fails at once

    def _beat(self) -> None:
        """Writes a new count, and the place of this process's loop, every second."""
        count = 0
        while not self._ending:
            count += 1
            with contextlib.suppress(Exception):  # `_guard` ends the process when the table is gone
                self._client.key_value_set(f"jaxlm/beat/{self.index}", f"{count} {loop_place}", True)
            time.sleep(1)

    def _watch(self) -> None:
        """Ends this process when another one has ended early, or has written no new count for too long.

        A mistake counts a second after it was seen: if all hosts notice it, each prints its own line. A stop counts at
        once: the first process, and the table with it, is gone `signals.TIDY` seconds later.
        """
        beats: dict[str, str] = {}
        silent, ended = [0.0] * self.count, [0.0] * self.count  # seconds without a new count, and with an end
        while not self._ending:
            with contextlib.suppress(Exception):
                new = dict(self._client.key_value_dir_get("jaxlm/beat/"))
                ends = dict(self._client.key_value_dir_get("jaxlm/end/"))
                self._unanswered = 0
                for i in range(self.count):
                    beat, end = f"jaxlm/beat/{i}", f"jaxlm/end/{i}"
                    code, *lines = json.loads(ends.get(end, "[0]"))
                    silent[i] = 0 if new.get(beat) != beats.get(beat) or end in ends else silent[i] + WATCH_EVERY
                    ended[i] += WATCH_EVERY * (end in ends)
                    mistake = code in (2, 3, 4)
                    if (code not in (0, STOPPED) or lines) and ended[i] > (1 if mistake else 0):
                        self._end(
                            code if mistake or code == STOPPED else LOST,
                            f"{self.name(i)} has ended with exit code {code}: {' '.join(lines)}",
                        )
                    if silent[i] > (FAILED_AFTER if self._failed else LOST_AFTER):
                        self._end(LOST, f"{self.name(i)} is gone: no sign of life for {silent[i]:.0f} s")
                beats = new
            time.sleep(WATCH_EVERY)

    def _guard(self) -> None:
        """Ends this process when the table cannot be read for too long.

        It counts its own rounds of one second instead of reading a clock. So the time in which all threads of this
        process stood still does not count.
        """
        while not self._ending:
            self._unanswered += 1
            if self._unanswered > (FAILED_AFTER if self._failed else LOST_AFTER):
                self._end(LOST, self._gone)
            time.sleep(1)

    def places(self) -> dict[str, str]:
        """The place of each process's loop, in words, as its last beat has it."""
        beats = dict(self._client.key_value_dir_get("jaxlm/beat/"))
        return {self.name(i): beats.get(f"jaxlm/beat/{i}", "0 gone").split(" ", 1)[1] for i in range(self.count)}

    def _reachable(self) -> bool:
        """Whether the coordinator can be reached."""
        return self.index == 0 or connect(self._coordinator) is None

    def _end(self, code: int, reason: str) -> None:
        """Prints the reason and ends this process at once, unless it is ending already."""
        if not self._ending:
            self._ending = True
            os.write(2, f"\njaxlm: {reason}; {self._advice(code)}\n".encode())
            self._let_read()
            os._exit(code)

    def _let_read(self, seconds: float = 3) -> None:
        """In the first process, waits so that the others can read the table, which is lost when this process ends."""
        if self.index == 0:
            time.sleep(seconds)

    def tell_stopped(self) -> None:
        """Tells the others that a signal ends this process. Otherwise they would wait for it in a collective."""
        self._ending = True
        self._client.key_value_set(f"jaxlm/end/{self.index}", json.dumps([STOPPED, "a signal"]), True)
        self._let_read(signals.TIDY - 0.2)

    def _advice(self, code: int) -> str:
        """The end of a last line: what happens now, and what the user can do if the same command is enough."""
        return "this host stops too" + ("; run the same command to resume" if code in (LOST, STOPPED) else "")


_hosts: Hosts | None = None  # set by `start`; one per process, like JAX's distributed state; None = a single process
loop_place = "before the first step"  # the place of this process's loop, in words; the watchdog sets it


def start() -> Hosts:
    """Begins to watch the other processes. Called once, when JAX is connected to them."""
    global _hosts
    _hosts = Hosts()
    signals.at_stop(_hosts.tell_stopped)
    return _hosts


def check_same(what: str, values: dict[str, Any]) -> None:
    """Raises UserError, the same on all hosts, unless all call this with the same values.

    Args:
      what: names the values in messages.
    """
    if _hosts is not None:
        _hosts.check_same(what, values)


def from_first(what: str, value: Callable[[], str]) -> str:
    """The first process computes the value; every process returns it.

    Args:
      what: names the value in messages about a late host.
    """
    return value() if _hosts is None else _hosts.from_first(what, value)


def from_all(what: str, value: str) -> list[str]:
    """The values of all processes, in their order.

    Args:
      what: names the value in messages about a late host.
    """
    return [value] if _hosts is None else _hosts.from_all(what, value)


def is_one_of_several() -> bool:
    """Whether this process is one of several."""
    return _hosts is not None


def places() -> dict[str, str]:
    """The place of each process's loop, in words. Only this process's if the coordinator does not answer."""
    if _hosts is not None:
        with contextlib.suppress(Exception):  # the coordinator itself may hang
            return _hosts.places()
    return {own_name(): loop_place}


def own_name() -> str:
    """How messages call this process."""
    return name(0) if _hosts is None else _hosts.name(_hosts.index)


def end_process(code: int, reason: str) -> None:
    """Prints the reason and ends this process at once. The others find out because it stops counting."""
    os.write(2, f"\njaxlm: {reason}\n".encode())
    os._exit(code)


def name(process: int) -> str:
    """How messages call a process."""
    return _hosts.name(process) if _hosts is not None else "this host"
