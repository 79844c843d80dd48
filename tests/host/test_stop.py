"""A signal while data is prepared ends the program at once, and a full disk or memory is reported in one line."""

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax.numpy as jnp
import pytest

from jaxlm.host.exit_codes import exit_code
from tests.runs import CONFIG, ROOT, flags


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_data_is_prepared_ends_the_program_at_once(number: signal.Signals, tmp_path: Path):
    text = tmp_path / "text.txt"
    text.write_bytes(b"".join(b"word%d other%d\n" % (i, i * 7919 % 100_003) for i in range(1_000_000)))
    keys = {"data.source": "text", "data.path": text, "data.tokenizer": "sentencepiece", "data.vocab_size": 5000,
            "data.val_fraction": 0.1, "data.cache_dir": tmp_path / "cache"}  # fmt: skip
    command = [sys.executable, "-m", "jaxlm.main", "--config", str(CONFIG), "--workdir", str(tmp_path / "run")]
    with subprocess.Popen([*command, *flags(**keys)], cwd=ROOT, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr
        assert process.stderr.readline().startswith("training a tokenizer")
        process.send_signal(number)
        sent = time.monotonic()
        err = process.stderr.read()
        assert process.wait(60) == 75, err
    assert time.monotonic() - sent < 5
    assert err.splitlines()[-1] == "jaxlm: stopped before the first step; run the same command again"
    assert "Traceback" not in err
    assert not (tmp_path / "run").exists() and not [p for p in (tmp_path / "cache").iterdir() if p.is_dir()]


def test_a_full_disk_or_memory_is_reported_in_one_line(capsys: pytest.CaptureFixture[str]):
    def disk() -> int:
        try:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "checkpoints/7")
        except OSError as error:
            raise RuntimeError("a write in the background failed") from error

    def long() -> int:  # like TensorStore's message, with paths in the middle
        raise ValueError(f"RESOURCE_EXHAUSTED: Error writing {'path/' * 100}: {os.strerror(errno.ENOSPC)}")

    def memory() -> int:
        return int(jnp.zeros((1 << 20, 1 << 20, 1 << 10))[0, 0, 0])

    assert exit_code(disk) == 2
    err = capsys.readouterr().err
    assert err.startswith("jaxlm: ") and "No space left" in err and "checkpoints/7" in err and err.count("\n") == 1
    assert exit_code(long) == 2
    assert capsys.readouterr().err.startswith("jaxlm: the disk is full: RESOURCE_EXHAUSTED")
    assert exit_code(memory) == 2
    err = capsys.readouterr().err
    assert err.startswith("jaxlm: out of memory") and "model.remat=full" in err and err.count("\n") == 1


def test_other_errors_keep_their_traceback():
    with pytest.raises(RuntimeError, match="a bug"):
        exit_code(lambda: (_ for _ in ()).throw(RuntimeError("a bug")))
