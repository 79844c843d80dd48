"""Eight simulated devices, temporary caches, and fixtures that several files share."""

import gc
import json
import os
import shutil
import threading
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

# JAX reads these at its first import. Optimizing is off, because tiny programs take longer to optimize than to run.
# `make test` also turns off XLA's newer code for fusions, and compiles in half the time; the longer tests of .ci/run
# have the code that users get. After jax 0.10 there is no other.
if os.environ.get("JAXLM_TEST_DEVICE") != "real":  # as tools/gpu_check.sh sets it
    flags = ["force_host_platform_device_count=8", "backend_optimization_level=0", "llvm_disable_expensive_passes=true"]
    if os.environ.get("JAXLM_TEST_COMPILER") == "fast" and version("jaxlib").startswith("0.10."):
        flags.append("cpu_use_fusion_emitters=false")
    os.environ["XLA_FLAGS"] = " ".join(f"--xla_{flag}" for flag in flags)
    os.environ["JAX_PLATFORMS"] = "cpu"


# Files that take minutes, the longest first, so that both workers, which share the files, end at about the same time.
LONG = (
    "test_processes",
    "test_step",
    "test_parallel",
    "test_resume",
    "test_other_configuration",
    "test_hosts",
    "test_chaos",
    "test_run",
    "test_workdir",
    "test_recovery",
    "test_configs",
    "test_bench",
    "test_finetuning",
    "test_documents",
    "test_generate",
    "test_storage",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    order = {name: i for i, name in enumerate(LONG)}
    items.sort(key=lambda item: order.get(item.path.stem, len(LONG)))


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))
    # All tests share one compilation cache, across processes and workers.
    base = tmp_path_factory.getbasetemp()
    compiled = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "compiled"
    os.environ |= {"JAX_COMPILATION_CACHE_DIR": str(compiled), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1"}
    os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"  # on some machines XLA prints a line for each program that it loads
    import jax

    jax.config.update("jax_compilation_cache_dir", str(compiled))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
    yield
    from jaxlm.host.runtime import IMPORTER

    for thread in threading.enumerate():
        if thread.name == IMPORTER:  # otherwise it would be running when the interpreter ends
            thread.join()


@pytest.fixture(scope="module", autouse=True)
def programs() -> Iterator[None]:
    """Drops the compiled programs after each file. Each program holds memory mappings, of which a process has a limited
    number; XLA crashes when it runs out.
    """
    yield
    import jax

    jax.clear_caches()
    gc.collect()


@pytest.fixture(autouse=True)
def environment() -> Iterator[None]:
    """Restores the environment variables that a run sets for XLA and oneDNN."""
    before = {key: os.environ.get(key) for key in ("XLA_FLAGS", "ONEDNN_DEFAULT_FPMATH_MODE")}
    yield
    for key, value in before.items():
        os.environ.pop(key, None)
        if value is not None:
            os.environ[key] = value


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The workdir of a run that is never stopped."""
    workdir = tmp_path_factory.mktemp("runs") / "whole"
    from tests.runs import run

    assert run(workdir) == 0
    return workdir


@pytest.fixture(scope="session")
def short(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The workdir of the same run, with steps up to the first checkpoint only."""
    workdir = tmp_path_factory.mktemp("runs") / "short"
    from tests.runs import CHECKPOINT, run

    assert run(workdir, steps=CHECKPOINT) == 0
    return workdir


@pytest.fixture
def copy(short: Path, tmp_path: Path) -> Path:
    """A copy of `short` that a test may change."""
    return Path(shutil.copytree(short, tmp_path / "copy"))


@pytest.fixture(scope="session")
def hf_specs() -> dict[str, str]:
    """The text of a tokenizer.json of each kind."""
    from tests.tokenizing import HF_KINDS, hf_spec

    return {kind: json.dumps(hf_spec(kind)) for kind in HF_KINDS}


@pytest.fixture(scope="session")
def hf(hf_specs: dict[str, str]) -> dict[str, Any]:
    from jaxlm.data.tokenizers.hf import HfTokenizer

    return {kind: HfTokenizer(spec.encode(), "test") for kind, spec in hf_specs.items()}


@pytest.fixture
def inspected(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    """A function that runs `jaxlm inspect` on the files in `tmp_path` and returns what it printed."""
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)

    from tests.inspecting import Seen, call, flags

    def run(*argv: object, **keys: Any) -> Any:
        code, out, error = call(monkeypatch, capsys, *argv, *flags(tmp_path, **keys))
        assert code == 0, error
        return Seen(out)

    return run


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The workdir of a run of two steps. Tests do not write to it."""
    from jaxlm.config.files import load
    from jaxlm.run import training
    from tests.exit_codes import flags
    from tests.runs import CONFIG

    workdir = tmp_path_factory.mktemp("finished") / "run"
    assert training.run(load(CONFIG, flags("checkpoint.every_steps=1")), workdir) == 0
    return workdir
