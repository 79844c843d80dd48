"""How much memory a process takes."""

import os
import re
import resource
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def resident_bytes() -> int:
    """Memory of this process now; its peak where the system does not say more."""
    return _of_status("self", "VmRSS") or _largest()


def peak_bytes(pid: int | None = None) -> int:
    """Peak memory of a running process, by default of this one; 0 = the system does not say it."""
    return _of_status(str(pid or "self"), "VmHWM") or (_largest() if pid in (None, os.getpid()) else 0)


def peak_of(devices: Sequence[Any]) -> int:
    """Peak memory of the fullest of these JAX devices; of this process where they do not say it, as on CPUs."""
    return max((d.memory_stats() or {}).get("peak_bytes_in_use", 0) for d in devices) or peak_bytes()


def _of_status(pid: str, name: str) -> int:
    """Bytes in Linux's file about a process; 0 if there is none."""
    path = Path(f"/proc/{pid}/status")
    found = re.search(rf"^{name}:\s*(\d+) kB", path.read_text(), re.MULTILINE) if path.exists() else None
    return int(found[1]) * 1024 if found else 0


def _largest() -> int:
    """The peak as POSIX counts it, which includes the program that started this one."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
