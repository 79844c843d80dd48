"""The watchdog prints where a run hangs, and nothing while the run moves."""

import subprocess
import sys
import time

import numpy as np
import pytest

from jaxlm.data.stream import TrainStream
from jaxlm.host import distributed
from jaxlm.host.watchdog import Watchdog
from tests.runs import ROOT

HANGS = """
import time
from jaxlm.host.watchdog import Watchdog
watchdog = Watchdog(0.2, abort=%s)
watchdog.start()
watchdog.reached(7, "reading the next batch")
def stuck_here():
    time.sleep(1.5)
stuck_here()
watchdog.stop()
print("went on")
"""


@pytest.mark.parametrize("abort, code", [(False, 0), (True, 5)])
def test_a_function_that_hangs_is_shown(abort: bool, code: int):
    result = subprocess.run([sys.executable, "-c", HANGS % abort], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == code
    assert "nothing has moved for 0 s (log.hang_seconds). this host: step 7, reading the next batch" in result.stderr
    assert "in stuck_here" in result.stderr
    # Each report comes after twice the time of the one before: at 0.2, 0.4, 0.8 s.
    assert result.stderr.count("in stuck_here") == (1 if abort else 3)
    assert ("went on" in result.stdout) != abort
    assert (result.stderr.splitlines()[-1].endswith("run the same command to resume")) == abort


def test_a_loop_that_moves_causes_no_output(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(distributed, "loop_place", "")
    watchdog = Watchdog(0.3)
    watchdog.start()
    for step in range(12):
        watchdog.reached(step, "waiting for the devices")
        time.sleep(0.05)
    watchdog.stop()
    assert distributed.places() == {"this host": "step 11, waiting for the devices"}
    assert capfd.readouterr().err == ""
    off = Watchdog(0)
    off.start()
    off.stop()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_worker_that_dies_is_an_error_not_a_stall():
    def make(first: int, count: int) -> dict[str, np.ndarray]:
        if first > 0:
            raise SystemExit  # ends a thread without an error message
        return {"inputs": np.zeros((count, 1, 1, 4), np.int32)}

    stream = TrainStream(make, 0, 100, "thread")
    with pytest.raises(RuntimeError, match="ended without an error"):
        for _ in range(100):
            next(stream)
    stream.close()
