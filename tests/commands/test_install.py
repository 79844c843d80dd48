"""An installed wheel in a new environment: the command, the packaged configurations, a user's own configuration."""

import os
import site
import subprocess
import sys
import venv
from pathlib import Path

import pytest

from tests.runs import ROOT

pytestmark = pytest.mark.slow
OWN = """
from jaxlm.configs import base

def get_config():
    c = base.get_config()
    c.steps, c.seq_len, c.batch_size, c.optim.warmup_steps = 2, 16, 2, 0
    c.model.num_layers, c.model.d_model, c.model.num_heads = 1, 16, 2
    c.data.source = "synthetic"
    c.data.vocab_size = 64
    return c
"""


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The `jaxlm` command of a new environment that uses all other packages of this one."""
    folder = tmp_path_factory.mktemp("install")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
    build = [*pip, "wheel", "--no-deps", "--no-build-isolation", "--no-index", "-w", str(folder), str(ROOT)]
    subprocess.run(build, check=True, capture_output=True)
    [wheel] = folder.glob("jaxlm-*.whl")
    venv.create(folder / "env", with_pip=False, symlinks=True)
    [packages] = folder.glob("env/lib/python*/site-packages")
    subprocess.run(
        [*pip, "--python", str(folder / "env"), "install", "--no-deps", "--no-index", str(wheel)], check=True
    )
    # Adds this environment's packages. Its own .pth files are not read there, so its editable jaxlm is not seen.
    (packages / "others.pth").write_text("\n".join(site.getsitepackages()))
    return folder / "env/bin/jaxlm"


def call(program: Path, folder: Path, *argv: str) -> subprocess.CompletedProcess[str]:
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "XLA_FLAGS")}
    return subprocess.run(
        [program, *argv], cwd=folder, env=env, capture_output=True, text=True, timeout=120, check=False
    )


def test_an_installed_jaxlm_trains_in_an_empty_folder(program: Path, tmp_path: Path):
    (tmp_path / "mine.py").write_text(OWN)
    trained = call(program, tmp_path, "train", "--config", "mine.py")
    assert (trained.returncode, trained.stderr) == (0, "")
    assert (tmp_path / "runs/mine/config.json").is_file()
    hint = trained.stdout.splitlines()[-1].removeprefix("next: ")
    assert hint == f"{program} evaluate --workdir runs/mine"
    assert call(program, tmp_path, *hint.split()[1:]).returncode == 0
    assert call(program, tmp_path, "--version").stdout.startswith("jaxlm 0.")


def test_a_packaged_configuration_is_found_by_name(program: Path, tmp_path: Path):
    refused = call(program, tmp_path, "train", "--config", "debug", "--config.steps=0")
    assert (refused.returncode, refused.stderr) == (2, "jaxlm: steps is 0; allowed: more than 0\n")
    unknown = call(program, tmp_path, "train", "--config", "nothing")
    assert unknown.returncode == 2 and "allowed: a file, or one of base, debug, finetune" in unknown.stderr
    assert not list(tmp_path.iterdir())
