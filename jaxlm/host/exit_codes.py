"""Turns the errors that end a command into one line and an exit code.

Exit codes: 0 done; 1 a bug; 2 the configuration, data or command line is wrong, or disk or memory is full; 3 training
diverged; 4 a checkpoint is unusable; 5 another host is gone, training hangs (`log.hang_abort`) or a device is at fault;
75 training was stopped by a signal, after saving its state if it had one; 130 another command was stopped by a signal.
"""

import errno
import os
import sys
from collections.abc import Callable

from jaxlm.config import UserError
from jaxlm.host import signals
from jaxlm.host.startup import STOPPED_TOOL, TOOL_STOPPED


def exit_code(program: Callable[[], int], name: str = "jaxlm", said: list[str] | None = None) -> int:
    """Runs `program` and returns its exit code.

    An error that the user can fix becomes one line on stderr and an exit code. Any other error is raised: a bug.

    Args:
      name: starts the line.
      said: a list to which the line, without the name, is appended.
    """

    def say(line: str) -> None:
        print(f"{name}: {line}", file=sys.stderr)
        if said is not None:
            said.append(line)

    try:
        try:
            return program()
        finally:
            signals.settle()
    except UserError as error:
        say(" ".join(str(error).split()))
        return 2
    except KeyboardInterrupt:  # the program does not call `signals.listen`
        say(STOPPED_TOOL)
        return TOOL_STOPPED
    except Exception as error:
        codes = {"Diverged": 3, "CheckpointError": 4, "Unsaved": 2, "Corrupt": 5}  # by name: their modules import jax
        code = codes.get(type(error).__name__)
        full = None if type(error).__name__ == "Unsaved" else _exhausted(error)  # Unsaved has advice in its own text
        if code is None and full is None:
            raise
        say(full or " ".join(str(error).split()))
        return code or 2


def _exhausted(error: BaseException | None) -> str | None:
    """A line with advice if the error, or one that led to it, says that disk or memory is full; else None."""
    memory = None
    while error is not None:
        text = " ".join(str(error).split())
        short = text if len(text) <= 300 else f"{text[:150]} … {text[-150:]}"
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or os.strerror(errno.ENOSPC) in text:
            return f"the disk is full: {short}; free some space and run the same command again, what was saved is kept"
        if "RESOURCE_EXHAUSTED" in text or isinstance(error, MemoryError):
            memory = f"out of memory: {short}; a smaller batch_size, more accum_steps or model.remat=full need less"
        error = error.__cause__ or error.__context__
    return memory
