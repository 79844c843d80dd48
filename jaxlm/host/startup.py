"""The first moments of a program, before it imports anything that takes time."""

import io
import os
import platform
import sys

from jaxlm.host import signals

HUGE_PAGES = "glibc.malloc.hugetlb=1"
STOPPED, TOOL_STOPPED = 75, 130  # exit codes after a signal: of the trainer, of all other commands
STOPPED_TOOL = "stopped; run the same command again, what is finished is kept"


def trainer() -> None:
    """Prepares the trainer to hear signals. Call it before all other imports."""
    _begin(STOPPED, f"jaxlm: {signals.BEFORE}", huge_pages=True)


def tool(name: str = "jaxlm", huge_pages: bool = False) -> None:
    """The same for any other command, which messages call `name`."""
    _begin(TOOL_STOPPED, f"{name}: {STOPPED_TOOL}", huge_pages)


def _begin(code: int, line: str, huge_pages: bool) -> None:
    signals.block()
    open_standard_streams()
    if huge_pages:
        relaunch_with_huge_pages()
    signals.listen(code, line)


def open_standard_streams() -> None:
    """Opens /dev/null in place of stdin, stdout and stderr where they are closed, else the next file would take their
    place; a character that stdout's encoding lacks is shown as a question mark.
    """
    for number, (name, mode) in enumerate((("stdin", "r"), ("stdout", "w"), ("stderr", "w"))):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(number, mode, encoding="utf-8", closefd=False))
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")


def on_cpu() -> bool:
    """Whether JAX is going to run on CPU: it was told to, or there is no accelerator's device file."""
    wanted = os.environ.get("JAX_PLATFORMS", "").split(",")[0]
    if wanted:
        return wanted == "cpu"
    return not any(map(os.path.exists, ("/dev/nvidiactl", "/dev/nvidia0", "/dev/kfd", "/dev/accel0", "/dev/vfio/0")))


def relaunch_with_huge_pages() -> None:
    """On CPU, starts this program again with transparent huge pages for malloc.

    XLA takes its buffers from malloc anew for every step, and each of their 4 KB pages costs a page fault: a quarter
    of a step of a small model. glibc (2.35 and later) reads the setting when a process starts, so it can't be made
    from inside. `GLIBC_TUNABLES` in the environment, even empty, keeps this from happening.
    """
    libc, version = platform.libc_ver()
    recent = libc == "glibc" and tuple(map(int, version.split(".")[:2])) >= (2, 35)
    if not recent or not on_cpu() or "GLIBC_TUNABLES" in os.environ:
        return
    os.environ["GLIBC_TUNABLES"] = HUGE_PAGES
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
