"""Many hosts: how they meet, what they must agree on, and how one learns that another is gone.

JAX's coordination service, in the first process, has a table of strings that all processes read and write. Each keeps
its host's name there, a count that goes up every second, and, when it ends, how. Whoever sees that another one has
ended early, or has not counted for half a minute, says so and ends too: in a collective it would wait for ever.
"""

import contextlib
import ctypes
import json
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from typing import Any

from jaxlm.config import UserError
from jaxlm.host import signals
from jaxlm.host.launcher import ADDRESS, number_in
from jaxlm.host.startup import STOPPED

LOST = 5  # exit code: another host is gone; the same command goes on
LOST_AFTER = 30  # seconds without a sign of life; JAX itself gives up after 100
FAILED_AFTER = 10  # the same where a collective has failed already
JOIN_LIMIT = 300  # seconds until all must be there, where JAXLM_JOIN_SECONDS does not say another number
PREPARE_LIMIT = 12 * 3600  # until all must have prepared their data; one that dies meanwhile is found in LOST_AFTER
PATIENCE = 10  # seconds of waiting, after which it is said for whom


def join(coordinator: str | None, num_processes: int | None, process_id: int | None) -> "Hosts":
    """Connects to the other processes; with no address given, JAX reads it from the launcher's environment.

    Raises:
      UserError: the others are not reached in time.
    """
    import jax

    limit = number_in("JAXLM_JOIN_SECONDS", 1, 10**6) if "JAXLM_JOIN_SECONDS" in os.environ else JOIN_LIMIT
    where = f"--coordinator {coordinator}" if coordinator else "the coordinator that the launcher's environment names"
    if coordinator is None and {"JOB_COMPLETIONS", "JOB_COMPLETION_INDEX", ADDRESS} <= os.environ.keys():
        # An indexed job of Kubernetes': JAX's own detection asks the cluster, for which a pod needs permissions.
        coordinator, process_id = os.environ[ADDRESS], int(os.environ["JOB_COMPLETION_INDEX"])
        num_processes, where = int(os.environ["JOB_COMPLETIONS"]), f"{ADDRESS}={coordinator}"
    failed = f"{where}: host {socket.gethostname()} cannot join the other processes"
    late = f"{failed} within {limit} s: not all of them came, or two have the same --process_id"
    if coordinator is not None:
        try:
            socket.getaddrinfo(coordinator.rpartition(":")[0].strip("[]"), None)
        except OSError as error:
            raise UserError(f"{failed}: its address cannot be found ({error.strerror or error})") from error
    if coordinator is not None and process_id != 0:
        _wait_for(coordinator, f"{failed} within {limit} s", limit)
    # A process that is alone on its host has all of its devices: JAX would give it one, as to each of Slurm's tasks.
    on_host = os.environ.get("SLURM_STEP_TASKS_PER_NODE") or os.environ.get("OMPI_COMM_WORLD_LOCAL_SIZE") or "1"
    alone = on_host.split("(")[0] == "1"
    _at_abort(lambda: (f"{late}; the same command tries again", LOST))  # what JAX does then
    try:
        jax.distributed.initialize(
            coordinator,
            num_processes,
            process_id,
            local_device_ids=[] if alone else None,
            initialization_timeout=limit,
        )
    except (RuntimeError, ValueError) as error:
        raise UserError(
            f"{failed}: {' '.join(str(error).split())[:200]}; allowed: processes that srun, mpirun or an indexed job"
            " started, or --coordinator, --num_processes and --process_id"
        ) from error
    global _hosts
    _hosts = Hosts()
    signals.at_stop(_hosts.tell_stopped)
    return _hosts


def _wait_for(coordinator: str, failed: str, limit: int) -> None:
    """Returns when somebody listens there."""
    deadline = time.monotonic() + limit
    while error := _connects(coordinator):
        if time.monotonic() > deadline:
            raise UserError(f"{failed}: {error.strerror or error}") from error
        time.sleep(0.5)


def _connects(coordinator: str) -> OSError | None:
    """None where somebody listens there, else what is wrong."""
    host, _, port = coordinator.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
    except OSError as error:
        return error
    return None


def _at_abort(reason: Callable[[], tuple[str, int] | None]) -> None:
    """Has this process end with a last line and an exit code where C++ aborts it: JAX does, without a coordinator.

    `reason` gives the two, or None where the abort is another one, which then takes its course.
    """

    def aborted(number: int) -> None:
        with contextlib.suppress(BaseException):  # a signal's handler may run here, and would be lost in C++
            if found := reason():
                os.write(2, f"\njaxlm: {found[0]}\n".encode())
                os._exit(found[1])
        ctypes.CDLL(None).signal(signal.SIGABRT, None)  # SIG_DFL

    global _abort_handler
    _abort_handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(aborted)
    ctypes.CDLL(None).signal(signal.SIGABRT, _abort_handler)


_abort_handler: Any = None  # must live as long as it may be called


class Hosts:
    """The processes of this run, after `join`."""

    def __init__(self) -> None:
        from jax._src import distributed

        state = distributed.global_state
        self._client: Any = state.client
        self.index, self.count = state.process_id, state.num_processes
        self._round = 0  # of exchanges so far: all hosts make the same ones in the same order
        self._told: list[str] = []  # keys of this host's values that others may still read
        self.names: list[str] = []
        self.names = self._exchange("the name", socket.gethostname(), JOIN_LIMIT)
        self._coordinator: str = state.coordinator_address or ""
        self._gone = f"{self.name(0)}, the coordinator at {self._coordinator}, is gone"
        self._ending = self._failed = False
        self._unanswered = 0  # seconds since the table was read
        for act in (self._beat, self._watch, self._guard):
            threading.Thread(target=act, daemon=True).start()
        _at_abort(lambda: None if self._reachable() else (f"{self._gone}; {self._advice(LOST)}", LOST))

    def name(self, index: int) -> str:
        return f"host {self.names[index]} (process {index})" if self.names else f"process {index}"

    def check_same(self, what: str, values: dict[str, Any]) -> None:
        """Raises UserError, on all hosts alike, unless all call this with the same values."""
        found = [json.loads(v) for v in self._exchange(what, json.dumps(values), PREPARE_LIMIT)]
        for i, other in enumerate(found):
            for key in other:
                if other[key] != found[0].get(key):
                    raise UserError(
                        f"{what}: {key} is {other[key]!r} on {self.name(i)} and {found[0].get(key)!r} on"
                        f" {self.name(0)}; allowed: the same on all hosts"
                    )

    def of_first(self, what: str, value: Callable[[], str]) -> str:
        self._round += 1
        if self.index == 0:
            found = value()
            self._tell(what, found)
            return found
        return self._get(what, 0, time.monotonic() + PREPARE_LIMIT)

    def of_all(self, what: str, value: str) -> list[str]:
        return self._exchange(what, value, PREPARE_LIMIT)

    def run(self, program: Callable[[], int], exit_code: Callable[..., int]) -> int:
        """Runs the program; does not return where it fails: then the others are told, and nobody is waited for."""
        said: list[str] = []

        def watched() -> int:
            try:
                return program()
            except Exception as error:
                if "JaxRuntimeError" in type(error).__name__:
                    # A collective fails at once where the network tells that its other end is gone. The watch, which
                    # learns who that is, ends this process; if it does not, the error is another.
                    self._failed = True
                    time.sleep(FAILED_AFTER + 5)
                raise

        try:
            code = exit_code(watched, said=said)
        except Exception:
            code = 1
            said.append("a bug, see its traceback")
            traceback.print_exc()
        self._ending = True
        with contextlib.suppress(Exception):  # the coordinator is gone: nobody to tell
            self._client.key_value_set(f"jaxlm/end/{self.index}", json.dumps([code, *said]))
        if code not in (0, STOPPED):
            self._let_read()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)  # what JAX does at exit would wait for the others
        return code

    def _exchange(self, what: str, value: str, limit: int) -> list[str]:
        """The values of all processes; those that are late are waited for, `limit` seconds at most."""
        self._round += 1
        read = self._told.copy()  # all have read these once all have told this value
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
        said = self.index != (process == 0)  # one host alone says it: the first, or the second about the first
        while True:
            began = time.monotonic()
            try:
                return self._client.blocking_key_value_get(self._key(what, process), 1000 * PATIENCE)
            except Exception as error:
                left = deadline - time.monotonic()
                if left <= 0:
                    raise UserError(f"{what} of {self.name(process)} did not come in time") from error
                if not said:
                    minutes = max(1, round(left / 60))
                    print(f"jaxlm: waiting for {what} of {self.name(process)}, {minutes} min at most", file=sys.stderr)
                    said = True
                time.sleep(max(0.0, began + 1 - time.monotonic()))  # without a coordinator it fails at once

    def _beat(self) -> None:
        count = 0
        while not self._ending:
            count += 1
            with contextlib.suppress(Exception):  # what fails is the guard's to see
                self._client.key_value_set(f"jaxlm/beat/{self.index}", f"{count} {here}", True)
            time.sleep(1)

    def _watch(self) -> None:
        """Ends this process when another one has ended early or is not heard of."""
        beats: dict[str, str] = {}
        silent = [0] * self.count  # seconds
        while not self._ending:
            with contextlib.suppress(Exception):
                new = dict(self._client.key_value_dir_get("jaxlm/beat/"))
                ends = dict(self._client.key_value_dir_get("jaxlm/end/"))
                self._unanswered = 0
                for i in range(self.count):
                    code, *said = json.loads(ends.get(f"jaxlm/end/{i}", "[0]"))
                    key = f"jaxlm/beat/{i}"
                    silent[i] = 0 if new.get(key) != beats.get(key) or f"jaxlm/end/{i}" in ends else silent[i] + 1
                    if code not in (0, STOPPED) or said:
                        same = code in (2, 3, 4, STOPPED)  # to be mended, or asked to stop: not just started again
                        self._end(
                            code if same else LOST, f"{self.name(i)} has ended with exit code {code}: {' '.join(said)}"
                        )
                    if silent[i] > (FAILED_AFTER if self._failed else LOST_AFTER):
                        self._end(LOST, f"{self.name(i)} is gone: nothing was heard of it for {silent[i]} s")
                beats = new
            time.sleep(1)

    def _guard(self) -> None:
        """Ends this process when the table cannot be read. Counts seconds that it lived itself: not those for which
        something else held all threads.
        """
        while not self._ending:
            self._unanswered += 1
            if self._unanswered > (FAILED_AFTER if self._failed else LOST_AFTER):
                self._end(LOST, self._gone)
            time.sleep(1)

    def places(self) -> dict[str, str]:
        """Where each process said last that it is."""
        beats = dict(self._client.key_value_dir_get("jaxlm/beat/"))
        return {self.name(i): beats.get(f"jaxlm/beat/{i}", "0 gone").split(" ", 1)[1] for i in range(self.count)}

    def _reachable(self) -> bool:
        return self.index == 0 or _connects(self._coordinator) is None

    def _end(self, code: int, reason: str) -> None:
        if not self._ending:
            self._ending = True
            os.write(2, f"\njaxlm: {reason}; {self._advice(code)}\n".encode())
            self._let_read()
            os._exit(code)

    def _let_read(self, seconds: float = 3) -> None:
        """Gives the others time to read what happened in the table, which ends with the first process."""
        if self.index == 0:
            time.sleep(seconds)

    def tell_stopped(self) -> None:
        """Tells the others that a signal ends this process, since they would wait for it in a collective."""
        self._ending = True
        self._client.key_value_set(f"jaxlm/end/{self.index}", json.dumps([STOPPED, "a signal"]), True)
        self._let_read(signals.TIDY - 0.2)

    def _advice(self, code: int) -> str:
        return "this host stops too" + (", and the same command goes on" if code in (LOST, STOPPED) else "")


_hosts: Hosts | None = None  # of this process, as JAX has one distributed state of a process
here = "before the first step"  # where the loop of this process is, in words


def check_same(what: str, values: dict[str, Any]) -> None:
    """Raises UserError, on all hosts alike, unless all have the same values; one host alone always has."""
    if _hosts is not None:
        _hosts.check_same(what, values)


def of_first(what: str, value: Callable[[], str]) -> str:
    """The value of the first process, which alone finds it."""
    return value() if _hosts is None else _hosts.of_first(what, value)


def of_all(what: str, value: str) -> list[str]:
    """The values of all processes, in their order."""
    return [value] if _hosts is None else _hosts.of_all(what, value)


def of_several() -> bool:
    """Whether this process is one of several."""
    return _hosts is not None


def places() -> dict[str, str]:
    """Where each host is, in words, as far as that is known."""
    if _hosts is not None:
        with contextlib.suppress(Exception):  # the coordinator may be what hangs
            return _hosts.places()
    return {own_name(): here}


def own_name() -> str:
    return name(0) if _hosts is None else _hosts.name(_hosts.index)


def end(code: int, reason: str) -> None:
    """Ends this process at once; the others learn of it by its silence."""
    os.write(2, f"\njaxlm: {reason}\n".encode())
    os._exit(code)


def name(process: int) -> str:
    return _hosts.name(process) if _hosts is not None else "this host"
