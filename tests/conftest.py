"""Eight simulated devices, and caches of the test session's own for token stores and compiled programs."""

import os
import tempfile

import pytest

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"  # read when JAX starts: before any import of it
os.environ["JAX_PLATFORMS"] = "cpu"

# Many tests, and the processes that they start, run the same tiny programs: each is compiled once.
COMPILED = tempfile.TemporaryDirectory(prefix="jaxlm-compiled-")
os.environ["JAX_COMPILATION_CACHE_DIR"] = COMPILED.name
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))
