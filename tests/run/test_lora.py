"""Runs with LoRA: what they start from, how they resume, and what a run that starts from them gets."""

from pathlib import Path

import jax
import numpy as np
import pytest

from jaxlm import main
from jaxlm.config import UserError
from jaxlm.host.exit_codes import exit_code
from jaxlm.interop.adapters import export_adapter
from jaxlm.model import lora
from jaxlm.run.open_run import open_run
from jaxlm.train import trained
from tests.runs import CONFIG, flags, lines, text_keys

LORA = {"model__lora_rank": 2, "optim__lr": 0.05, "checkpoint__every_steps": 2, "log__every_steps": 1}


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> dict:
    """The keys of a run on a short text, whose base model is in the folder `base`."""
    folder = tmp_path_factory.mktemp("lora")
    keys = text_keys(folder) | {"folder": folder}
    assert run(keys, "base") == 0
    return keys


def run(keys: dict, name: str, **more: object) -> int:
    own = {k: v for k, v in keys.items() if k != "folder"}
    workdir = str(keys["folder"] / name)
    return exit_code(lambda: main.run(["--config", str(CONFIG), "--workdir", workdir, *flags(**(own | more))]))


def names(tree: object) -> set[str]:
    return {"/".join(k.key for k in path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)}


def test_a_stopped_run_ends_as_one_that_was_not(keys: dict, capfd: pytest.CaptureFixture[str]) -> None:
    base = str(keys["folder"] / "base")
    assert run(keys, "whole", **LORA, steps=4, checkpoint__resume=base) == 0
    assert " trained) · " in capfd.readouterr().out
    assert run(keys, "parts", **LORA, steps=2, checkpoint__resume=base) == 0
    assert run(keys, "parts", **LORA, steps=4, checkpoint__resume=base) == 0
    whole, parts = (open_run(keys["folder"] / name, None) for name in ("whole", "parts"))
    jax.tree.map(np.testing.assert_array_equal, whole.params, parts.params)
    start = open_run(keys["folder"] / "base", None)
    own = trained.part(whole.config, whole.params)
    assert names(own) and all(name.endswith((lora.A, lora.B)) for name in names(own))
    jax.tree.map(np.testing.assert_array_equal, trained.without(whole.params, own), start.params)
    losses = [m["loss"] for m in lines(keys["folder"] / "whole") if "loss" in m]
    assert losses[-1] < losses[0]


def test_another_run_gets_the_merged_weights(keys: dict) -> None:
    first = open_run(keys["folder"] / "whole", None)
    resume = str(first.folder)
    assert run(keys, "again", **LORA, checkpoint__resume=resume) == 0
    got = open_run(keys["folder"] / "again", 0)
    want = lora.merged(first.config.model, first.params)
    jax.tree.map(np.testing.assert_array_equal, lora.without(got.params), want)
    assert np.abs(want["layers"]["mlp"]["up"]["kernel"] - first.params["layers"]["mlp"]["up"]["kernel"]).max() > 0
    assert not np.any(got.params["layers"]["mlp"]["up"][lora.B])


def test_lora_needs_a_trained_model(keys: dict, capfd: pytest.CaptureFixture[str]) -> None:
    assert run(keys, "alone", **LORA) == 2
    assert "resume is 'auto'; allowed with model.lora_rank: the workdir of a trained model" in capfd.readouterr().err
    assert not (keys["folder"] / "alone").exists()


def test_what_an_adapter_cannot_hold_is_refused(keys: dict, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--adapter: .*base has model.lora_rank=0"):
        export_adapter(open_run(keys["folder"] / "base", None), tmp_path / "adapter")
    base = str(keys["folder"] / "base")
    assert run(keys, "norms", **LORA, checkpoint__resume=base, optim__freeze="kernel|embedding") == 0
    with pytest.raises(UserError, match=r"--adapter: .*norms trained final_norm/scale too"):
        export_adapter(open_run(keys["folder"] / "norms", None), tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


def test_lora_cannot_change_on_the_way(keys: dict, capfd: pytest.CaptureFixture[str]) -> None:
    base = str(keys["folder"] / "base")
    for other in ({"model__lora_rank": 3}, {"optim__freeze": "kernel"}):
        assert run(keys, "whole", **(LORA | {"steps": 4} | other), checkpoint__resume=base) == 2
        key = next(iter(other)).replace("__", ".")
        assert key in capfd.readouterr().err
