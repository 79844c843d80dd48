"""How commands end.

Exit codes: 0 done, 1 a bug, 2 the configuration, data or command line is wrong, 3 training diverged, 4 a checkpoint is
unusable, 5 another host is gone or a device is at fault, 75 stopped by a signal after saving, 130 a tool stopped by a
signal.
"""

import errno
import os
import sys
from collections.abc import Callable

from jaxlm.config import UserError
from jaxlm.host import signals
from jaxlm.host.startup import STOPPED_TOOL, TOOL_STOPPED


def exit_code(program: Callable[[], int], name: str = "jaxlm", said: list[str] | None = None) -> int:
    """Runs a command line; what a user can mend becomes one line on stderr, added to `said` too, and its exit code."""

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
    except KeyboardInterrupt:  # where nobody listens to signals
        say(STOPPED_TOOL)
        return TOOL_STOPPED
    except Exception as error:
        codes = {"Diverged": 3, "CheckpointError": 4, "Unsaved": 2, "Corrupt": 5}  # by name: their modules import jax
        code = codes.get(type(error).__name__)
        full = None if type(error).__name__ == "Unsaved" else _exhausted(error)  # that one says it itself
        if code is None and full is None:
            raise
        say(full or " ".join(str(error).split()))
        return code or 2


def _exhausted(error: BaseException | None) -> str | None:
    """What a user can do about a full disk or memory, where that is what an error, or one behind it, says."""
    memory = None
    while error is not None:
        text = " ".join(str(error).split())
        short = text if len(text) <= 300 else f"{text[:150]} … {text[-150:]}"
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or os.strerror(errno.ENOSPC) in text:
            return f"the disk is full: {short}; make room and run the same command again, what was saved whole is there"
        if "RESOURCE_EXHAUSTED" in text or isinstance(error, MemoryError):
            memory = f"out of memory: {short}; a smaller batch_size, more accum_steps or model.remat=full need less"
        error = error.__cause__ or error.__context__
    return memory
