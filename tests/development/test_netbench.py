"""tools/netbench.py limits the link between its hosts as asked."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from jaxlm.config import UserError
from tools import netbench

ROOT = Path(__file__).parents[2]
TINY = [
    "--config",
    str(ROOT / "configs/debug.py"),
    "--tokens",
    "16",
    "--config.seq_len=16",
    "--config.model.num_layers=1",
    "--config.model.d_model=128",
    "--config.optim.name=adamw",
    "--rounds",
    "1",
    "--steps",
    "2",
]


def can_make_namespaces() -> bool:
    if os.geteuid() or not shutil.which("ip") or not shutil.which("tc"):
        return False
    made = subprocess.run(["ip", "netns", "add", "jaxlmtest"], capture_output=True).returncode == 0
    return made and subprocess.run(["ip", "netns", "del", "jaxlmtest"], capture_output=True).returncode == 0


def namespaces(pid: int) -> list[str]:
    """The namespaces that a process named after itself, and their folders. Other tests may make some meanwhile."""
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout
    folders = [str(path) for path in Path("/etc/netns").glob("*")]
    return [name for name in listed.splitlines() + folders if f"jaxlm{pid}h" in name]


@pytest.mark.ci
@pytest.mark.slow
@pytest.mark.skipif(not can_make_namespaces(), reason="needs root and iproute2, to make network namespaces")
def test_the_link_is_as_slow_as_asked_for():
    """A step takes the time that its bytes need on the link; a reduction that sends less takes less."""
    command = [sys.executable, str(ROOT / "tools/netbench.py"), *TINY, "--mbit", "4", "--reduce", "pmean,topk"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd="/") as process:
        try:
            out, errors = process.communicate(timeout=200)
        finally:
            process.kill()
    assert process.returncode == 0, errors
    seconds = json.loads(out.splitlines()[-1])["seconds"]
    sent = 4 * (2 * 65 * 128 + 12 * 128**2)  # with two hosts, an all-reduce sends as many bytes as it reduces
    at_once = 256e3  # bytes that pass before the limit applies
    assert (sent - at_once) * 8 / 4e6 < seconds["jaxlm pmean"] < 2 * sent * 8 / 4e6
    assert seconds["jaxlm topk"] < seconds["jaxlm pmean"] / 2
    assert not namespaces(process.pid)


@pytest.mark.parametrize(
    "argv, words",
    [
        (["--reduce", "pmean,int7"], ["--reduce", "'int7'", "powersgd"]),
        (["--hosts", "1"], ["--hosts is 1", "2 to 250"]),
        (["--mbit", "nan"], ["--mbit is nan", "0.01 to"]),
        (["--tokens", "100"], ["--tokens is 100", "multiple of seq_len"]),
        (["--config.batch_size=4"], ["batch_size", "--tokens"]),
        (["--config.parallel.reduce=int8"], ["parallel.reduce", "--reduce"]),
    ],
)
def test_wrong_arguments_are_refused(argv: list[str], words: list[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "argv", ["netbench", *argv])
    with pytest.raises(UserError) as error:
        netbench.main()
    assert all(word in str(error.value) for word in words)
