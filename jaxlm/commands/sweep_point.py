"""Trains one point of a sweep: in this process (`--point N`), or in a process of its own."""

import subprocess
import sys
import time
from pathlib import Path

from jaxlm.checkpoint import workdirs
from jaxlm.commands.sweep_state import Sweep, record
from jaxlm.host import runtime, signals
from jaxlm.host.exit_codes import exit_code
from jaxlm.host.signals import StopSignal
from jaxlm.host.startup import STOPPED


def train_here(sweep: Sweep, index: int) -> int:
    """Trains or resumes the point, notes how it ended, and returns its exit code.

    Raises:
      UserError: another process trains it.
    """
    workdir, said = sweep.workdir(sweep.runs[index]), []

    def train() -> int:
        config = sweep.config(sweep.runs[index])
        runtime.configure_jax(config, 1)
        from jaxlm.run import training

        return training.run(config, workdir, stop=signals.of_program(), lock=lock)

    with workdirs.Lock() as lock:
        lock.take(workdir)
        try:
            code = exit_code(train, said=said)
        except Exception as error:
            record(sweep.folder, index, 1, f"{type(error).__name__}: {' '.join(str(error).split())}")
            raise
        record(sweep.folder, index, code, " ".join(said))
    return code


def train_apart(folder: Path, index: int, stop: StopSignal) -> int:
    """Trains the point in another process and returns its exit code, at least 128 if a signal ended the process."""
    command = [sys.executable, "-m", "jaxlm", "sweep", f"--workdir={folder}", f"--point={index}"]
    with signals.starting:
        # In a session of its own, so that Ctrl-C reaches it once, through this process: a second signal would end it
        # before it has saved.
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True)
    signals.at_stop(process.terminate)
    told = False
    while process.poll() is None:
        if stop.received and not told:
            process.terminate()
            told = True
        time.sleep(0.05)
    signals.forget(process.terminate)
    code = process.returncode
    if code < 0:
        record(folder, index, 128 - code, f"signal {-code} ended it")
        return 128 - code
    if code not in (0, 2, STOPPED):  # after 2, another process may be training the point
        record(folder, index, code)
    return code
