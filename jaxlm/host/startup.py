"""What a program does first, before it imports anything that takes time: signals, standard streams, huge pages."""

import io
import os
import platform
import sys

from jaxlm.host import signals

HUGE_PAGES = "glibc.malloc.hugetlb=1"
STOPPED, TOOL_STOPPED = 75, 130  # exit codes after a signal: of the trainer and of all other commands
STOPPED_TOOL = "stopped; run the same command again, what is finished is kept"


def trainer() -> None:
    """Prepares the trainer: signals, standard streams and huge pages. Call it before all other imports.

    From here on, a signal ends the program with exit code 75. May start the program again, for huge pages.
    """
    _begin(STOPPED, f"jaxlm: {signals.BEFORE}", huge_pages=True)


def tool(name: str = "jaxlm", huge_pages: bool = False) -> None:
    """Does the same for any other command, with exit code 130.

    Args:
      name: of the command, for messages.
      huge_pages: whether the program may be started again, with huge pages.
    """
    _begin(TOOL_STOPPED, f"{name}: {STOPPED_TOOL}", huge_pages)


def _begin(code: int, line: str, huge_pages: bool) -> None:
    signals.block()
    open_standard_streams()
    if huge_pages:
        relaunch_with_huge_pages()
    signals.listen(code, line)


def open_standard_streams() -> None:
    """Opens /dev/null in place of each standard stream that is closed. Otherwise the next file that is opened would get
    its number. Also makes stdout print a question mark for a character that its encoding lacks.
    """
    for number, (name, mode) in enumerate((("stdin", "r"), ("stdout", "w"), ("stderr", "w"))):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest free number
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(number, mode, encoding="utf-8", closefd=False))
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")


def on_cpu() -> bool:
    """Whether JAX will run on CPU: because JAX_PLATFORMS says so, or because no accelerator has a device file."""
    wanted = os.environ.get("JAX_PLATFORMS", "").split(",")[0]
    if wanted:
        return wanted == "cpu"
    return not any(map(os.path.exists, ("/dev/nvidiactl", "/dev/nvidia0", "/dev/kfd", "/dev/accel0", "/dev/vfio/0")))


def relaunch_with_huge_pages() -> None:
    """On CPU, starts this program again with transparent huge pages for malloc.

    XLA allocates its buffers anew in every step, and each of their 4 KB pages costs a page fault. For a small model,
    these take a quarter of the step. glibc (2.35 and later) reads the setting only when a process starts, so a running
    program cannot change it. If `GLIBC_TUNABLES` is in the environment, even empty, the program is not started again.
    """
    libc, version = platform.libc_ver()
    recent = libc == "glibc" and tuple(map(int, version.split(".")[:2])) >= (2, 35)
    if not recent or not on_cpu() or "GLIBC_TUNABLES" in os.environ:
        return
    os.environ["GLIBC_TUNABLES"] = HUGE_PAGES
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
