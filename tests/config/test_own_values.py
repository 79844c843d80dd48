"""Each optimizer has values of its own, which apply to the keys that nobody sets."""

import dataclasses
import json
from pathlib import Path

import pytest

from jaxlm.config import OptimConfig, OwnFloat, files, flatten
from jaxlm.config.own_values import OWN_VALUES
from tests.configurations import BASE, ROOT

KEYS = [f.name for f in dataclasses.fields(OptimConfig) if f.type is OwnFloat]
MUON = {"lr": 0.02, "weight_decay": 0.0, "b1": 0.9, "b2": 0.95, "momentum": 0.95}  # docs/recipe.md


def values(optim: OptimConfig) -> dict[str, float]:
    return {key: getattr(optim, key) for key in KEYS}


@pytest.mark.parametrize("name", OWN_VALUES)
def test_an_optimizer_brings_its_own_values(name: str, tmp_path: Path) -> None:
    wanted = OWN_VALUES[name]
    assert set(wanted) == set(KEYS)
    assert values(files.load(BASE, [f"--config.optim.name={name}"]).optim) == wanted
    file = tmp_path / "mine.py"
    file.write_text(
        "from configs import base\n"
        f"def get_config():\n    c = base.get_config()\n    c.optim.name = '{name}'\n    return c\n"
    )
    assert values(files.load(file).optim) == wanted
    assert (wanted["lr"] == MUON["lr"]) == (name == "muon")
    if name == "muon":
        assert wanted == MUON


def test_values_that_are_set_replace_the_optimizers_own() -> None:
    args = ["--config.optim.name=lion", "--config.optim.lr=0.02", "--config.optim.weight_decay=0"]
    got = files.load(BASE, args).optim
    assert values(got) == OWN_VALUES["lion"] | {"lr": 0.02, "weight_decay": 0.0}
    args += ["--config.optim.lr=none", "--config.optim.weight_decay", "None"]  # none restores the optimizer's own value
    assert values(files.load(BASE, args).optim) == OWN_VALUES["lion"]


def test_a_saved_configuration_holds_numbers_and_loads_again(tmp_path: Path) -> None:
    config = files.load(BASE, ["--config.optim.name=lion", "--config.optim.b1=0.8"])
    saved = tmp_path / "config.json"
    saved.write_text(json.dumps({"config": dataclasses.asdict(config)}))
    assert "null" not in saved.read_text() and files.load(saved) == config
    assert files.load(saved, ["--config.optim.b1=none"]).optim.b1 == OWN_VALUES["lion"]["b1"]


SHIPPED = {
    "base": ("muon", 0.02, 0.0, 0.9, 0.95),
    "debug": ("muon", 0.02, 0.0, 0.9, 0.95),
    "shakespeare_char": ("muon", 0.02, 0.0, 0.9, 0.95),
    "gpt_10m": ("adamw", 1e-3, 0.0, 0.9, 0.95),
    "gpt2_124m": ("adamw", 6e-4, 0.1, 0.9, 0.95),
    "llama_1b": ("adamw", 4e-4, 0.1, 0.9, 0.95),
    "lm1b": ("adamw", 1.6e-3, 0.1, 0.9, 0.95),
}


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_configurations_have_these_values(name: str) -> None:
    needs_path = name in ("shakespeare_char", "gpt_10m", "gpt2_124m", "llama_1b")
    flat = flatten(files.load(ROOT / f"configs/{name}.py", ["--config.data.path=x"] * needs_path))
    got = tuple(flat[f"optim.{key}"] for key in ("name", "lr", "weight_decay", "b1", "b2"))
    assert got == SHIPPED[name] and flat["optim.momentum"] == 0.95
