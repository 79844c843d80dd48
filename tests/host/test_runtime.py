"""Flags and checks before JAX starts, and the end of a program."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from jaxlm.config import UserError
from jaxlm.config.files import load
from jaxlm.host import runtime
from jaxlm.host.stop import LEFT

CONFIG = Path(__file__).parents[2] / "configs/debug.py"
ALL = ["deterministic=true", "parallel.overlap=true", "parallel.bucket_mb=25"]


def flags(monkeypatch: pytest.MonkeyPatch, own: str, *overrides: str) -> list[str]:
    monkeypatch.setenv("XLA_FLAGS", own)
    return runtime.gpu_flags(load(CONFIG, [f"--config.{o}" for o in overrides]), 1)


def test_gpu_flags_are_those_that_the_run_needs(monkeypatch: pytest.MonkeyPatch):
    assert flags(monkeypatch, "", "parallel.devices=1") == []
    plain = flags(monkeypatch, "")
    assert "--xla_gpu_enable_latency_hiding_scheduler=true" in plain and not any("pipelined" in f for f in plain)
    everything = flags(monkeypatch, "", *ALL)
    assert f"--xla_gpu_all_reduce_combine_threshold_bytes={25 * 2**20}" in everything
    assert {"--xla_gpu_enable_pipelined_all_reduce=true", "--xla_gpu_deterministic_ops=true"} <= set(everything)


def test_flags_in_the_environment_override_those_of_the_run(monkeypatch: pytest.MonkeyPatch):
    own = "--xla_gpu_enable_latency_hiding_scheduler=false --xla_gpu_all_gather_combine_threshold_bytes=1"
    left = flags(monkeypatch, own, *ALL)
    assert left and not any("latency" in f or "all_gather_combine" in f for f in left)


def test_cpu_flags_are_those_that_the_run_needs(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("XLA_FLAGS", "")
    monkeypatch.setenv("ONEDNN_DEFAULT_FPMATH_MODE", "")
    for amx, precision, count in ((True, "fastest", 3), (True, "highest", 0), (False, "fastest", 0)):
        monkeypatch.setattr(runtime, "has_amx", lambda amx=amx: amx)
        chosen = runtime.cpu_flags(load(CONFIG, [f"--config.model.matmul_precision={precision}"]))
        assert len(chosen) == count and all("onednn" in f or "ynn" in f for f in chosen)
    overlap = runtime.cpu_flags(load(CONFIG, ["--config.parallel.overlap=true"]))
    assert overlap == ["--xla_disable_hlo_passes=cpu-all-reduce-combiner"]


PRODUCTS = """
import sys
from pathlib import Path
from jaxlm.host import runtime
from jaxlm.config.files import load
runtime.configure_jax(load(Path(sys.argv[1]), [f"--config.model.matmul_precision={sys.argv[2]}"]), 1)
import jax, numpy as np
a, b = np.random.default_rng(0).standard_normal((2, 256, 256)).astype(np.float32)
exact = a.astype(np.float64) @ b
product = np.asarray(jax.jit(lambda a, b: a @ b)(a, b))
error = np.abs(product - exact).max() / np.linalg.norm(a, axis=1).max() / np.linalg.norm(b, axis=0).max()
print(error, flush=True)
import os
os._exit(0)  # XLA's oneDNN may abort when its program is dropped just after it ran
"""


@pytest.mark.parametrize("precision", ["highest", "default", "fastest"])
def test_products_are_as_exact_as_the_configuration_says(precision: str):
    """float32 has a unit roundoff of 2**-24, bfloat16 of 2**-8. Errors are relative to the largest |row| |column|."""
    result = subprocess.run(
        [sys.executable, "-c", PRODUCTS, str(CONFIG), precision],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""},
    )
    rounded = precision == "fastest" and runtime.has_amx()
    error = float(result.stdout)
    assert (2**-14 < error < 2**-8) if rounded else (error < 2**-20)


@pytest.mark.slow
def test_xla_knows_every_flag(monkeypatch: pytest.MonkeyPatch):
    """XLA ends a process that sets a flag it does not know."""
    monkeypatch.setattr(runtime, "has_amx", lambda: True)
    known = " ".join(
        [*flags(monkeypatch, "", *ALL), *runtime.cpu_flags(load(CONFIG, ["--config.parallel.overlap=true"]))]
    )
    known += " ".join(["", *runtime.cpu_flags(load(CONFIG, ["--config.model.matmul_precision=fastest"]))])
    for extra, code in (("", 0), (" --xla_gpu_no_such_flag=true", 1)):
        result = subprocess.run(
            [sys.executable, "-c", "import jax; jax.devices()"],
            capture_output=True,
            env=os.environ | {"XLA_FLAGS": known + extra, "JAX_PLATFORMS": "cpu"},
        )
        assert result.returncode == code, result.stderr


LEAVES = """
import atexit, threading, time
from jaxlm.host import runtime
atexit.register(print, "cleaned up")
if NAME:
    threading.Thread(target=time.sleep, args=(600,), name=NAME, daemon=True).start()
print("done")
runtime.leave(75)
"""


@pytest.mark.parametrize(
    "name, out", [("", "done\ncleaned up\n"), (runtime.IMPORTER, "done\ncleaned up\n"), (LEFT, "done\n")]
)
def test_the_program_ends_without_waiting_for_threads(name: str, out: str):
    """If a thread was left inside XLA, no exit functions run, because those of JAX may crash."""
    program = LEAVES.replace("NAME", repr(name))
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert (result.returncode, result.stdout, result.stderr) == (75, out, "")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a full device")
def test_output_that_cannot_be_written_is_reported_at_the_end():
    program = "from jaxlm.host import runtime; print('{}'); runtime.leave(0)"
    with open("/dev/full", "w") as full:
        result = subprocess.run(
            [sys.executable, "-c", program],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONUNBUFFERED": ""},
        )
    assert result.returncode == 2 and result.stderr.startswith("jaxlm: some output could not be written: ")


@pytest.mark.parametrize(
    "name, value",
    [
        ("JAX_NUM_CPU_DEVICES", "two"),
        ("JAX_NUM_CPU_DEVICES", "0"),
        ("XLA_FLAGS", "--xla_force_host_platform_device_count=-1"),
    ],
)
def test_an_impossible_number_of_devices_is_refused(name: str, value: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=rf"{name}.* is '{value.rpartition('=')[2]}'; allowed: 1 to 9999"):
        runtime.check_environment()


def test_a_device_that_the_machine_lacks_is_refused(tmp_path: Path):
    result = subprocess.run(
        [sys.executable, "-m", "jaxlm.main", "--config", str(CONFIG), "--workdir", str(tmp_path / "run")],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=CONFIG.parents[1],
        env=os.environ | {"JAX_PLATFORMS": "typo"},
    )
    assert result.returncode == 2 and result.stderr.count("\n") == 1, result.stderr
    assert "JAX_PLATFORMS is 'typo': JAX finds no device" in result.stderr
    assert not (tmp_path / "run").exists()


CLOSED = """
from jaxlm.host import startup
startup.open_standard_streams()
file = open("file", "w")
print("hello │")
assert file.fileno() > 2
"""


@pytest.mark.parametrize("closed", ["", "<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_a_file_never_takes_the_place_of_a_closed_stream(closed: str, tmp_path: Path):
    result = subprocess.run(
        ["sh", "-c", f'exec "$0" -c "$1" {closed}', sys.executable, CLOSED],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=os.environ | {"PYTHONIOENCODING": "ascii", "PYTHONPATH": str(CONFIG.parents[1])},
    )
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout == ("" if ">&- 2" in closed or closed == ">&-" else "hello ?\n")
    assert (tmp_path / "file").read_text() == ""
