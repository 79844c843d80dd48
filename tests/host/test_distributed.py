"""The command line or a launcher's environment gives the number of processes, before any of them is contacted."""

import os
from typing import Any

import pytest

from jaxlm.config import UserError
from jaxlm.host.launcher import ADDRESS, count_processes

LAUNCHERS = ("OMPI_", "SLURM_", "JOB_", "JAX_COORDINATOR")
MPI = {"OMPI_COMM_WORLD_SIZE": "3", "OMPI_COMM_WORLD_RANK": "2"}
SLURM = {"SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "0", "SLURM_STEP_NODELIST": "a,b"}
POD = {"JOB_COMPLETIONS": "2", "JOB_COMPLETION_INDEX": "1", ADDRESS: "first:1234"}


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in os.environ:
        if name.startswith(LAUNCHERS):
            monkeypatch.delenv(name)


@pytest.mark.parametrize(
    "env, count",
    [
        ({}, 1),
        (MPI, 3),
        (SLURM, 4),
        (POD, 2),
        (MPI | SLURM | {"SLURM_STEP_NUM_TASKS": "1"}, 3),  # mpirun inside a Slurm step
        ({"SLURM_NTASKS": "4", "SLURM_PROCID": "0"}, 1),  # a batch script without srun
        ({"JOB_COMPLETION_INDEX": "5"}, 1),  # an indexed job whose pods are separate runs
    ],
)
def test_the_environment_gives_the_number_of_processes(
    env: dict[str, str], count: int, monkeypatch: pytest.MonkeyPatch
):
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    assert count_processes(None, None, None) == count


@pytest.mark.parametrize(
    "env, words",
    [
        (MPI | {"OMPI_COMM_WORLD_RANK": "3"}, ["OMPI_COMM_WORLD_RANK is '3'", "0 to 2"]),
        (SLURM | {"SLURM_STEP_NUM_TASKS": "abc"}, ["SLURM_STEP_NUM_TASKS is 'abc'"]),
        (SLURM | {"SLURM_STEP_NODELIST": ""}, ["SLURM_STEP_NODELIST is not set"]),
        (POD | {"JOB_COMPLETION_INDEX": "7"}, ["JOB_COMPLETION_INDEX is '7'", "0 to 1"]),
        (POD | {"JOB_COMPLETIONS": "0"}, ["JOB_COMPLETIONS is '0'", "1 to 100000"]),
        (SLURM | {"SLURM_STEP_NUM_TASKS": "9" * 5000}, ["SLURM_STEP_NUM_TASKS is '9999", "1 to 100000"]),
        (POD | {"JOB_COMPLETIONS": "²"}, ["JOB_COMPLETIONS is '²'"]),
        (POD | {ADDRESS: "first"}, [f"{ADDRESS} is 'first'", "HOST:PORT"]),
        ({k: v for k, v in POD.items() if k != ADDRESS}, [f"{ADDRESS} is not set"]),
        ({k: v for k, v in POD.items() if k != "JOB_COMPLETIONS"}, ["JOB_COMPLETIONS is not set"]),
        ({k: v for k, v in POD.items() if k != "JOB_COMPLETION_INDEX"}, ["JOB_COMPLETION_INDEX is not set"]),
    ],
)
def test_an_incomplete_or_wrong_environment_is_refused(
    env: dict[str, str], words: list[str], monkeypatch: pytest.MonkeyPatch
):
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError) as error:
        count_processes(None, None, None)
    assert all(word in str(error.value) for word in words), error.value


@pytest.mark.parametrize(
    "flags, words",
    [
        (("a:1", 2, None), ["--coordinator, --num_processes and --process_id go together"]),
        (("a:1", 0, 0), ["--num_processes is 0"]),
        (("a:1", 10**9, 0), ["--num_processes is 1000000000", "1 to 100000"]),
        (("a:1", 2, 2), ["--process_id is 2", "0 to 1"]),
        (("a", 2, 0), ["--coordinator is 'a'", "HOST:PORT"]),
        (("a:²", 2, 0), ["--coordinator is 'a:²'"]),
        (("a:99999", 2, 0), ["--coordinator is 'a:99999'"]),
    ],
)
def test_incomplete_or_wrong_flags_are_refused(flags: tuple[Any, Any, Any], words: list[str]):
    with pytest.raises(UserError) as error:
        count_processes(*flags)
    assert all(word in str(error.value) for word in words)
