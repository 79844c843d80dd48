"""Finds out how many processes a run has, from flags or from the environment that a launcher sets."""

import os
import re

from jaxlm.config import UserError, show

ADDRESS = "JAX_COORDINATOR_ADDRESS"  # HOST:PORT of the first process, which an indexed Kubernetes job must set
MOST = 100_000  # processes; a larger number is a slip


def count_processes(coordinator: str | None, num_processes: int | None, process_id: int | None) -> int:
    """The number of processes of the run: `num_processes` if given, else from the environment that Slurm, Open MPI or
    an indexed Kubernetes job sets, else 1.

    Raises:
      UserError: a value is wrong, or values that belong together are not all given.
    """
    if coordinator is not None and num_processes is not None and process_id is not None:
        if not 1 <= num_processes <= MOST:
            raise UserError(f"--num_processes is {num_processes}; allowed: 1 to {MOST}")
        if not 0 <= process_id < num_processes:
            raise UserError(f"--process_id is {process_id}; allowed: 0 to {num_processes - 1}")
        _check_address("--coordinator", coordinator)
        return num_processes
    if not coordinator is num_processes is process_id is None:
        raise UserError("--coordinator, --num_processes and --process_id go together; allowed: all three or none")
    # Open MPI comes first, because mpirun may run inside a Slurm step.
    for count, index, more in (
        ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK", None),
        ("SLURM_STEP_NUM_TASKS", "SLURM_PROCID", "SLURM_STEP_NODELIST"),
        ("JOB_COMPLETIONS", "JOB_COMPLETION_INDEX", ADDRESS),
    ):
        # If only some of the variables are set, there are several processes: without an error, each would run alone.
        if count in os.environ or (index == "JOB_COMPLETION_INDEX" and {index, ADDRESS} <= os.environ.keys()):
            number = number_in(count, 1, MOST)
            if number > 1:
                number_in(index, 0, number - 1)
                if more is not None and not os.environ.get(more):
                    raise UserError(f"{more} is not set; allowed: set, beside {count}={number}")
                if more == ADDRESS:
                    _check_address(ADDRESS, os.environ[ADDRESS])
            return number
    return 1


def number_in(variable: str, low: int, high: int) -> int:
    """The integer in an environment variable. Raises UserError unless it is set, and from `low` to `high`."""
    text = os.environ.get(variable)
    if text is None or not re.fullmatch("[0-9]{1,9}", text) or not low <= int(text) <= high:
        raise UserError(f"{variable} is {'not set' if text is None else show(text)}; allowed: {low} to {high}")
    return int(text)


def _check_address(key: str, address: str) -> None:
    host, _, port = address.rpartition(":")
    if not host or not (port.isascii() and port.isdecimal()) or not 0 < int(port) < 2**16:
        raise UserError(f"{key} is '{address}'; allowed: HOST:PORT")
