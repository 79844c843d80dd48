"""Eight simulated devices, and a token-store cache of the test session's own."""

import os

import pytest

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"  # read when JAX starts: before any import of it
os.environ["JAX_PLATFORMS"] = "cpu"


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))
