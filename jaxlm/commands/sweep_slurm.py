"""Writes the batch file of a sweep: a Slurm array with a task for each point."""

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from jaxlm.commands.sweep_state import Sweep
from jaxlm.config import UserError
from jaxlm.host.durable import write_whole

MARK = "written by jaxlm sweep"
# `scontrol requeue` gets the task by its place in the array: the job number of one task is that of the whole array.
SCRIPT = """\
#!/bin/bash
# A task for each point of a sweep, {mark}:
#
#   sbatch --gpus-per-task=1 {file}
#
# Options before the file's name come before those below. A task that is preempted, or whose time is nearly up, saves,
# is queued again and resumes.
#SBATCH --job-name={job}
#SBATCH --array={array}
#SBATCH --ntasks=1
#SBATCH --chdir={current}
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output={output}
# Two minutes before the time is up, Slurm sends SIGTERM; the program saves and ends with exit code 75.
#SBATCH --signal=TERM@120

restarts=${{SLURM_RESTART_COUNT:-0}}
task=${{SLURM_ARRAY_JOB_ID}}_$SLURM_ARRAY_TASK_ID
echo "point $SLURM_ARRAY_TASK_ID, job $task on $SLURM_JOB_NODELIST, restart $restarts"
srun --ntasks=1 --kill-on-bad-exit=0 --cpus-per-task="${{SLURM_CPUS_ON_NODE:-1}}" \\
    "${{JAXLM_PYTHON:-{python}}}" -m jaxlm sweep --workdir {folder} --point "$SLURM_ARRAY_TASK_ID"
code=$?

# 75: stopped after saving. 5, or more than 128 if a signal ended the process: the host is lost. With all other codes,
# the point is finished or something must be fixed first.
if {{ [ $code = 75 ] || [ $code = 5 ] || [ $code -gt 128 ]; }} && [ "$restarts" -lt "${{JAXLM_RESTARTS:-100}}" ]; then
    echo "jaxlm ended with $code: queued again"
    exec scontrol requeue "$task"
fi
exit $code
"""


def check_path(path: Path) -> None:
    """Raises UserError unless a batch file can be written there, before the sweep is."""
    if not path.absolute().parent.is_dir() or path.is_dir():
        raise UserError(f"--slurm is {path}; allowed: a file in a folder that exists")
    if path.exists() and MARK not in path.read_text("utf-8", errors="replace"):
        raise UserError(f"--slurm is {path}, which is there and no batch file of a sweep; allowed: a new file")


def write(path: Path, sweep: Sweep, indices: Sequence[int]) -> None:
    """Writes the batch file for these points.

    Raises:
      UserError: the file cannot be written.
    """
    folder = sweep.folder.absolute()
    text = SCRIPT.format(
        mark=MARK,
        file=shlex.quote(str(path)),
        job=shlex.quote(folder.name),
        array=",".join(map(str, indices)),
        current=shlex.quote(str(Path.cwd())),
        output=shlex.quote(str(folder / "slurm-%A_%a.log")),
        python=sys.executable,
        folder=shlex.quote(str(folder)),
    )
    try:
        write_whole(path, text)
    except OSError as error:
        raise UserError(f"--slurm is {path}: {error.strerror}; allowed: a file that you may write") from error
