"""When a signal ends a program, and when it is only noted."""

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
# What Python's own handlers would wait for, and what would swallow an exception that they raise.
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
        [sys.executable, "-c", program], cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env=os.environ | {"PYTHONUNBUFFERED": ""},
    )  # fmt: skip
    assert process.stdout and process.stdout.readline() == "begun\n"
    return process


@pytest.mark.parametrize("busy", [IN_C, SWALLOWS])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ends_at_once_whatever_the_main_thread_does(number: signal.Signals, busy: str):
    process = started("", f"print('not flushed yet')\n{busy}")
    time.sleep(0.1)
    process.send_signal(number)
    assert process.communicate(timeout=20) == ("not flushed yet\n", "stopped\n")
    assert process.returncode == 75


# Makes file after file, as a loop that nobody has told of its end does.
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


def test_a_second_one_ends_at_once():
    process = started("stop.defer()")
    for _ in range(2):
        process.send_signal(signal.SIGTERM)
        time.sleep(0.05)  # the same one, as `timeout` sends it
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(1)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=20)
    assert process.returncode == 75 and err.startswith("jaxlm: stopped by a second signal; ")


def test_noted_ones_are_not_lost_when_there_is_nothing_left_to_save():
    process = started("stop.defer()", "while not stop.received: time.sleep(0.01)\nstop.release('all is saved')")
    process.send_signal(signal.SIGTERM)
    assert process.communicate(timeout=20)[1] == "jaxlm: all is saved\n"
    assert process.returncode == 75


def test_one_that_comes_before_it_listens_is_heard_also_by_a_program_that_replaces_it(tmp_path: Path):
    first = tmp_path / "first.py"
    second = ["-c", "from jaxlm.host import signals; signals.block(); signals.listen(75, 'stopped'); " + IN_C]
    first.write_text(
        f"import os, sys\nfrom jaxlm.host import signals\nsignals.block()\nprint('begun', flush=True)\n"
        f"sys.stdin.readline()\nos.execv(sys.executable, {[sys.executable, *second]!r})"
    )
    process = subprocess.Popen(
        [sys.executable, str(first)], cwd=ROOT, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
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
def test_heard_while_a_command_imports(number: signal.Signals, command: list[str], code: int):
    """Python says when an import is done, here the first of those that follow `startup`."""
    process = subprocess.Popen(
        [sys.executable, "-X", "importtime", *command], cwd=ROOT, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, env=os.environ | {"GLIBC_TUNABLES": "", "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
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


def test_what_is_to_be_tidied_up(tmp_path: Path):
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


def test_a_pool_of_processes_unblocks_no_signal():
    """Python's resource tracker does, which starts with the first pool."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signals.NUMBERS)
    try:
        with workers(1) as pool:
            assert pool.submit(abs, -1).result() == 1
            assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) >= set(signals.NUMBERS)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def test_what_fails_because_it_ends_is_not_said():
    """`settle` never returns once `end` has begun."""

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


@pytest.mark.slow
def test_signals_to_all_commands_at_random_moments(tmp_path: Path):
    root = hasattr(os, "geteuid") and os.geteuid() == 0 and shutil.which("ip") and shutil.which("tc")
    commands = ["train", "train anew", "generate", "evaluate", "prepare_data", "inspect_data", "bench", "bench data",
                "bench comm", "chaos", *(["netbench"] if root else [])]  # fmt: skip
    result = subprocess.run(
        [sys.executable, "tools/chaos_signals.py", "--workdir", str(tmp_path / "signals"), "--within=6",
         f"--signals={len(commands)}", f"--commands={','.join(commands)}"],
        cwd=ROOT, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
    found = json.loads(result.stdout.splitlines()[-1])
    assert list(found) == commands and all(counts["kept"] == 1 for counts in found.values())
