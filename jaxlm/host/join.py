"""Joins the processes of a run: finds the coordinator, and connects JAX to it."""

import os
import socket
import time

from jaxlm.config import UserError
from jaxlm.host import distributed
from jaxlm.host.coordinator import at_abort, connect
from jaxlm.host.launcher import ADDRESS, number_in


def join(coordinator: str | None, num_processes: int | None, process_id: int | None) -> distributed.Hosts:
    """Connects this process to the others. If all arguments are None, they come from the launcher's environment.

    If another process is late, JAX aborts this one, which then ends with exit code LOST.

    Raises:
      UserError: the coordinator is not reached in time, or JAX refuses to join.
    """
    import jax

    limit = number_in("JAXLM_JOIN_SECONDS", 1, 10**6) if "JAXLM_JOIN_SECONDS" in os.environ else distributed.JOIN_LIMIT
    where = f"--coordinator {coordinator}" if coordinator else "the coordinator that the launcher's environment names"
    if coordinator is None and {"JOB_COMPLETIONS", "JOB_COMPLETION_INDEX", ADDRESS} <= os.environ.keys():
        # An indexed Kubernetes job. JAX's own detection would query the cluster, for which a pod needs permissions.
        coordinator, process_id = os.environ[ADDRESS], int(os.environ["JOB_COMPLETION_INDEX"])
        num_processes, where = int(os.environ["JOB_COMPLETIONS"]), f"{ADDRESS}={coordinator}"
    failed = f"{where}: host {socket.gethostname()} cannot join the other processes"
    late = f"{failed} within {limit} s: some did not start, or two have the same --process_id"
    if coordinator is not None:
        try:
            socket.getaddrinfo(coordinator.rpartition(":")[0].strip("[]"), None)
        except OSError as error:
            raise UserError(f"{failed}: its address cannot be found ({error.strerror or error})") from error
    if coordinator is not None and process_id != 0:
        _wait_for(coordinator, f"{failed} within {limit} s", limit)
    # A process that is alone on its host gets all devices there. By itself, JAX gives each Slurm task only one.
    on_host = os.environ.get("SLURM_STEP_TASKS_PER_NODE") or os.environ.get("OMPI_COMM_WORLD_LOCAL_SIZE") or "1"
    alone = on_host.split("(")[0] == "1"
    at_abort(lambda: (f"{late}; run the same command to try again", distributed.LOST))
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
    return distributed.start()


def _wait_for(coordinator: str, failed: str, limit: int) -> None:
    """Returns when a process listens at the coordinator's address. Raises UserError after `limit` seconds."""
    deadline = time.monotonic() + limit
    while error := connect(coordinator):
        if time.monotonic() > deadline:
            raise UserError(f"{failed}: {error.strerror or error}") from error
        time.sleep(0.5)
