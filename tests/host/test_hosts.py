"""Two hosts wait for each other, save together, and hold the same bits."""

import json
import socket
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxlm.checkpoint.reading import Checkpoints
from jaxlm.config.files import load
from jaxlm.run import training
from tests.processes import finish, flags, numbers, start
from tests.runs import CONFIG, ROOT

ANOTHER = f"host {socket.gethostname()} (process 1)"

# The second host compiles slowly. The first host's disk is full from the report of step BEGIN to that of step END.
CHILD = """
import errno, os, sys, time
from jaxlm import main
from jaxlm.host import distributed, retry, together
from jaxlm.run import metrics
distributed.PATIENCE, retry.FIRST, retry.PATIENCE = 1, 0.01, 1.0
first = sys.argv[sys.argv.index("--process_id") + 1] == "0"
workdir = sys.argv[sys.argv.index("--workdir") + 1]
full, compiled = [False], together.compiled

class Slow:
    def __init__(self, program):
        self.program = program

    def lower(self, *args):
        time.sleep(4)
        return self.program.lower(*args)

    def __call__(self, *args):
        return self.program(*args)

def slow(program, what):
    late = not first and what in ("devices", "training step")
    return compiled(Slow(program) if late else program, what)

def hook(event, args):
    if not full[0] or event not in ("open", "os.mkdir", "os.rename") or not isinstance(args[0], str | os.PathLike):
        return
    reads = event == "open" and not args[2] & (os.O_WRONLY | os.O_RDWR)
    if not reads and os.fsdecode(args[0]).startswith(workdir):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), args[0])

report = metrics.Log.__call__

def watched(self, m):
    if "loss" in m:
        # The earlier checkpoint shall be whole first, unless it is one that fails.
        for _ in range(600 if first and m["step"] == 15 else 0):
            if full[0] or os.path.isdir(os.path.join(workdir, "checkpoints", "10")):
                break
            time.sleep(0.1)
        full[0] = first and BEGIN <= m["step"] < END
    report(self, m)

together.compiled, metrics.Log.__call__ = slow, watched
sys.addaudithook(hook)
sys.exit(main.exit_code(lambda: main.run(sys.argv[1:])))
"""


def child(begin: int, end: int) -> list[str]:
    return ["-c", CHILD.replace("BEGIN", str(begin)).replace("END", str(end))]


def checkpoints(workdir: Path) -> list[int]:
    return sorted(int(p.name) for p in (workdir / "checkpoints").iterdir() if p.name.isdigit())


def arrays(workdir: Path, step: int) -> dict[str, np.ndarray]:
    opened = Checkpoints(workdir)
    found = opened.restore_arrays(step)
    opened.close()
    return found


@pytest.mark.ci
def test_hosts_wait_for_a_slow_host_and_save_after_a_full_disk(tmp_path: Path):
    """The first host says which host it waits for. Both hosts continue while nothing can be saved, and later save what
    one process saves, up to rounding, with rows of a lossy reduction and of the optimizer's state from both hosts.
    """
    keys = ["steps=40", "checkpoint.every_steps=10", "eval.every_steps=0", "parallel.zero=1", "parallel.reduce=int8"]
    results = finish(start(tmp_path / "run", 2, *keys, program=child(10, 25)))
    assert [code for code, *_ in results] == [0, 0], results
    for what in ("devices", "training step"):
        assert f"waiting for the compiled program ({what}) of {ANOTHER}, 720 min at most" in results[0][2], results
    assert "the state of step 10 is NOT saved: No space left" in results[0][1]
    assert not {10, 20} & set(checkpoints(tmp_path / "run")) and {0, 30, 40} <= set(checkpoints(tmp_path / "run"))
    assert [m["step"] for m in numbers(tmp_path / "run")] == [1, *range(5, 41, 5), 40]

    assert training.run(load(CONFIG, flags(*keys, "parallel.devices=4")), tmp_path / "one") == 0
    want = arrays(tmp_path / "one", 40)
    found = arrays(tmp_path / "run", 40)
    assert found.keys() == want.keys() and any(name.startswith("sync/") for name in want)
    for name, x in want.items():
        if x.dtype.kind == "f" and not name.startswith(("sync/", "train/guard")):
            np.testing.assert_allclose(found[name], x, rtol=0, atol=0.02 * np.abs(x).max(), err_msg=name)
        assert (found[name].shape, found[name].dtype) == (x.shape, x.dtype)


@pytest.mark.ci
@pytest.mark.slow
def test_both_hosts_end_with_2_if_the_last_state_cannot_be_saved(tmp_path: Path):
    keys = ["steps=20", "checkpoint.every_steps=10", "eval.every_steps=0"]
    results = finish(start(tmp_path / "run", 2, *keys, program=child(15, 1000)))
    assert [code for code, *_ in results] == [2, 2], results
    for *_, error in results:
        assert "the state of step 20 cannot be saved: No space left" in error and "Traceback" not in error
        assert "the newest checkpoint is of step 10" in error
    assert checkpoints(tmp_path / "run") == [0, 10]


@pytest.mark.slow
def test_a_bit_that_flips_on_one_host_ends_both(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Both hosts name the device, do not save its state, and end with exit code 5."""
    plan: dict[str, Any] = {"flip": 15}
    monkeypatch.setenv("CHAOS", json.dumps(plan))
    monkeypatch.setenv("CHAOS_LOG", str(tmp_path / "log"))
    keys = ["steps=25", "checkpoint.every_steps=10", "eval.every_steps=0"]
    results = finish(start(tmp_path / "run", 2, *keys, program=[str(ROOT / "tools/chaos_child.py")]))
    assert [code for code, *_ in results] == [5, 5], results
    for *_, error in results:
        assert f"step 20: device 1 (cpu) of {ANOTHER} differs from the 3 others in params/" in error
        assert "Traceback" not in error
    assert checkpoints(tmp_path / "run") == [0, 10]
