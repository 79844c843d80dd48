"""A signal ends a program at once, or is only noted while a run has something to save."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from jaxlm.host import signals
from jaxlm.host.signals import StopSignal
from jaxlm.host.workers import workers
from tests.runs import ROOT

PROGRAM = """
import sys, time
from jaxlm.host import signals
signals.block()
signals.listen(75, "stopped")
stop = signals.of_program()
WHAT
print("begun", flush=True)
BUSY
"""
# Code that Python's own handlers would wait for, and code that would swallow an exception that they raise.
IN_C = "import ctypes; ctypes.CDLL(None).sleep(60)"
SWALLOWS = """
class Swallows:
    def __del__(self):
        while True: pass
Swallows()
"""


def started(what: str, busy: str = IN_C) -> subprocess.Popen[str]:
    program = PROGRAM.replace("WHAT", what).replace("BUSY", busy)
    process = subprocess.Popen(
        [sys.executable, "-c", program],
        cwd=ROOT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=os.environ | {"PYTHONUNBUFFERED": ""},
    )
    assert process.stdout and process.stdout.readline() == "begun\n"
    return process


@pytest.mark.parametrize("busy", [IN_C, SWALLOWS])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_program_at_once_whatever_the_main_thread_does(number: signal.Signals, busy: str):
    process = started("", f"print('not flushed yet')\n{busy}")
    time.sleep(0.1)
    process.send_signal(number)
    assert process.communicate(timeout=20) == ("not flushed yet\n", "stopped\n")
    assert process.returncode == 75


# Creates file after file, like a loop that does not notice the end of the program.
WRITES = """
import itertools
for i in itertools.count():
    try:
        open(f"{folder}/{i}", "w").close()
    except OSError:
        pass
"""


def test_a_temporary_folder_is_removed_even_while_it_is_written_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    opened = (
        "from jaxlm.host.temporary import temporary_folder\ncontext = temporary_folder()\nfolder = context.__enter__()"
    )
    for _ in range(3):
        process = started(opened, WRITES)
        time.sleep(0.2)
        assert list(tmp_path.iterdir())
        process.terminate()
        process.communicate(timeout=20)
        assert process.returncode == 75
        assert not list(tmp_path.iterdir())


def test_a_second_signal_ends_the_program_at_once():
    process = started("stop.defer()")
    for _ in range(2):
        process.send_signal(signal.SIGTERM)
        time.sleep(0.05)  # both count as one signal: `timeout` sends it twice
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(1)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=20)
    assert process.returncode == 75 and err.startswith("jaxlm: stopped by a second signal; ")


def test_a_noted_signal_ends_the_program_once_nothing_is_left_to_save():
    process = started("stop.defer()", "while not stop.received: time.sleep(0.01)\nstop.release('all is saved')")
    process.send_signal(signal.SIGTERM)
    assert process.communicate(timeout=20)[1] == "jaxlm: all is saved\n"
    assert process.returncode == 75


def test_a_blocked_signal_ends_the_program_that_replaces_this_one(tmp_path: Path):
    first = tmp_path / "first.py"
    second = ["-c", "from jaxlm.host import signals; signals.block(); signals.listen(75, 'stopped'); " + IN_C]
    first.write_text(
        f"import os, sys\nfrom jaxlm.host import signals\nsignals.block()\nprint('begun', flush=True)\n"
        f"sys.stdin.readline()\nos.execv(sys.executable, {[sys.executable, *second]!r})"
    )
    process = subprocess.Popen(
        [sys.executable, str(first)],
        cwd=ROOT,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout and process.stdout.readline() == "begun\n"
    process.send_signal(signal.SIGINT)
    assert process.communicate("go on\n", timeout=20)[1] == "stopped\n"
    assert process.returncode == 75


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize(
    "command, code",
    [(["-m", "jaxlm.main"], 75), (["tools/generate.py"], 130), (["tools/evaluate.py"], 130),
     (["tools/prepare_data.py"], 130), (["tools/inspect_data.py"], 130), (["tools/bench.py"], 130),
     (["tools/chaos.py"], 130), (["tools/netbench.py"], 130)],
)  # fmt: skip
def test_a_signal_ends_a_command_during_its_imports(number: signal.Signals, command: list[str], code: int):
    """Python prints a line after each import; the signal is sent after the first import that follows `startup`."""
    process = subprocess.Popen(
        [sys.executable, "-X", "importtime", *command],
        cwd=ROOT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=os.environ | {"GLIBC_TUNABLES": "", "PYTHONPATH": str(ROOT)},
    )
    assert process.stderr
    begun = False
    for line in process.stderr:
        begun |= line.endswith("jaxlm.host.startup\n")
        if begun and line.rsplit("|")[-1].strip() in ("json", "argparse", "dataclasses"):
            break
    process.send_signal(number)
    err = process.communicate(timeout=30)[1]
    assert process.returncode == code, err
    assert "Traceback" not in err and ": stopped" in err


def test_registered_functions_run_when_a_signal_ends_the_program(tmp_path: Path):
    (tmp_path / "folder").mkdir()
    child = "p = subprocess.Popen(['sleep', '600']); signals.at_stop(p.kill); print(p.pid, flush=True)"
    acts = (f"shutil.rmtree({str(tmp_path / 'folder')!r})", "1 / 0")
    given = "\n".join(f"signals.at_stop(lambda: {act})" for act in acts)
    process = started(f"import shutil, subprocess\n{given}\nprint('begun', flush=True)\n{child}")
    assert process.stdout
    pid = int(process.stdout.readline())
    process.send_signal(signal.SIGTERM)
    assert process.communicate(timeout=20)[1] == "stopped\n"
    assert process.returncode == 75 and not (tmp_path / "folder").exists()
    deadline = time.monotonic() + 5
    with pytest.raises(ProcessLookupError):
        while time.monotonic() < deadline:
            os.kill(pid, 0)
            time.sleep(0.01)


def test_signals_stay_blocked_in_a_pool_of_processes():
    """Python's resource tracker, which starts with the first pool, would unblock them."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signals.NUMBERS)
    try:
        with workers(1) as pool:
            assert pool.submit(abs, -1).result() == 1
            assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) >= set(signals.NUMBERS)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def test_errors_that_the_end_causes_are_not_reported():
    """`settle` does not return while `end` runs, and the real `end` ends the process."""

    class Ends(StopSignal):
        def end(self, line: str) -> None:
            begun.set()
            ended.wait()

    begun, ended, returned = threading.Event(), threading.Event(), threading.Event()
    stop = Ends()
    threading.Thread(target=stop.receive, daemon=True).start()
    assert begun.wait(10)
    threading.Thread(target=lambda: (stop.settle(), returned.set()), daemon=True).start()
    assert not returned.wait(0.2)
    ended.set()
    assert returned.wait(10)


@pytest.mark.ci
def test_commands_handle_signals_at_random_moments(tmp_path: Path):
    root = hasattr(os, "geteuid") and os.geteuid() == 0 and shutil.which("ip") and shutil.which("tc")
    commands = ["train", "train anew", "generate", "evaluate", "prepare_data", "bench", "chaos"]
    commands += ["netbench"] if root else []
    result = subprocess.run(
        [
            sys.executable,
            "tools/chaos_signals.py",
            "--workdir",
            str(tmp_path / "signals"),
            "--within=6",
            f"--signals={len(commands)}",
            f"--commands={','.join(commands)}",
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert result.returncode == 0, result.stdout + result.stderr
    found = json.loads(result.stdout.splitlines()[-1])
    assert list(found) == commands and all(counts["kept"] == 1 for counts in found.values())
