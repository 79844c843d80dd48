"""Configurations are read from files, command lines and workdirs, or refused with a message that names the mistake."""

import dataclasses
import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pytest

from jaxlm.config import SOURCES, Config, UserError, changes, files, overrides, schema
from tests.configurations import BASE, ROOT, refusal


@pytest.fixture
def base() -> Config:
    return files.load(BASE)


# The files


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.py")), ids=lambda p: p.stem)
def test_every_file_loads(path: Path) -> None:
    needs_data = ["--config.data.path=corpus.txt"] if "--config.data.path" in path.read_text() else []
    assert schema.flatten(files.load(path, needs_data)).keys() == schema.key_types().keys()


def test_a_file_works_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine").mkdir()
    path = tmp_path / "mine" / "small.py"
    path.write_text(
        "from configs import base\ndef get_config():\n    c = base.get_config()\n    c.steps = 55\n    return c\n"
    )
    monkeypatch.chdir(tmp_path)
    before = list(sys.path)
    assert files.load("mine/small.py").steps == 55
    assert sys.path == before


BROKEN = {
    "typo": ("c.stepz = 5", r"unknown key 'stepz'; did you mean 'steps'\?"),
    "typo_in_section": ("c.optim.lrr = 5", r"unknown key '(optim\.)?lrr'; did you mean 'optim\.lr'\?"),
    "typo_when_read": ("c.steps = c.batchsize", r"unknown key 'batchsize'; did you mean 'batch_size'\?"),
    "syntax": ("c.steps = = 5", "SyntaxError"),
    "raises": ("c.steps = 1 / 0", "ZeroDivisionError: division by zero"),
    "import": ("import a_module_that_is_not_there", "ModuleNotFoundError"),
    "wrong_type": ("c.steps = '100'", r"^steps is '100'; allowed: a whole number$"),
    "wrong_section": ("c.model = 3", r"model.*3"),
    "returns_none": ("return None", r"get_config\(\) returned NoneType; allowed: jaxlm\.config\.Config"),
    "returns_dict": ("return {'steps': 5}", r"get_config\(\) returned dict"),
}


@pytest.mark.parametrize("line, said", BROKEN.values(), ids=BROKEN.keys())
def test_a_broken_file_is_refused_with_the_reason(tmp_path: Path, line: str, said: str) -> None:
    path = tmp_path / "mine.py"
    path.write_text(
        f"from configs import base\ndef get_config():\n    c = base.get_config()\n    {line}\n    return c\n"
    )
    assert re.search(said, refusal(path=path)), refusal(path=path)


def test_a_file_that_is_not_a_configuration_is_refused(tmp_path: Path) -> None:
    assert "no such file" in refusal(path=tmp_path / "none.py")
    assert "no such file" in refusal(path=tmp_path)  # a folder
    (tmp_path / "empty.py").write_text("")
    assert "get_config" in refusal(path=tmp_path / "empty.py")
    (tmp_path / "config.yaml").write_text("{}")
    assert "allowed: a Python file (.py), or the config.json of a run" in refusal(path=tmp_path / "config.yaml")
    (tmp_path / "config.json").write_text("{}")
    assert "not the configuration of a run" in refusal(path=tmp_path / "config.json")


# Overrides


def test_overrides_set_values_of_every_type(base: Config) -> None:
    args = [
        "--config.steps=77",
        "--config.batch_size",
        "16",
        "--config.optim.lr=3e-4",
        "--config.optim.clip_norm=2",  # a float written as a whole number
        "--config.deterministic=true",
        "--config.model.tie_embeddings",
        "--noconfig.model.qk_norm",
        "--config.log.tensorboard=False",
        "--config.model.activation=swiglu",
        "--config.model.position",
        "learned",
        "--config.eval.sample_prompt=x = 'a b'",
        "--config.data.cache_dir=",
    ]
    got = files.load(BASE, args)
    expected = {
        "steps": 77,
        "batch_size": 16,
        "optim.lr": 3e-4,
        "optim.clip_norm": 2.0,
        "deterministic": True,
        "model.tie_embeddings": True,
        "model.qk_norm": False,
        "log.tensorboard": False,
        "model.activation": "swiglu",
        "model.position": "learned",
        "eval.sample_prompt": "x = 'a b'",
    }
    assert schema.flatten(got) == schema.flatten(base) | expected
    differ = {k for k, v in expected.items() if schema.flatten(base)[k] != v}
    assert differ == set(expected)
    for key, kind in schema.key_types().items():
        if get_origin(kind) is not Literal:
            assert type(schema.flatten(got)[key]) is kind, key


def test_overrides_leave_the_given_configuration_alone(base: Config) -> None:
    before = schema.flatten(base)
    assert overrides.apply_overrides(base, ["--config.optim.lr=0.5"]).optim.lr == 0.5
    assert schema.flatten(base) == before


def test_every_choice_can_be_set(base: Config) -> None:
    choices = {k: get_args(t) for k, t in schema.key_types().items() if get_origin(t) is Literal}
    assert len(choices) > 10
    extra = ["--config.data.tfds_name=lm1b", "--config.data.tokenizer_path=x", "--config.model.dtype=bfloat16"]
    numbers = " ".join(["1"] * (base.model.head_size // 2))
    extra += [f"--config.model.rope_{k}={v}" for k, v in {"short": numbers, "long": numbers, "original": 9}.items()]
    for key, values in choices.items():
        for value in values:
            path = ["--config.data.path=x"] * (key == "data.source" and SOURCES[value].named_by != "source")
            config = overrides.apply_overrides(base, [*extra, *path, f"--config.{key}={value}"])
            assert schema.flatten(config)[key] == value


UNKNOWN = {
    "optim.lrr": "optim.lr",
    "seqlen": "seq_len",
    "batchsize": "batch_size",
    "model.layers": "model.num_layers",
    "modle.d_model": "model.d_model",
    "data.dropout": "model.dropout",
    "lr": "optim.lr",
    "checkpoints.keep": "checkpoint.keep",
}


@pytest.mark.parametrize("form", ["--config.{}=1", "--config.{} 1"])
@pytest.mark.parametrize("key", UNKNOWN)
def test_the_message_for_an_unknown_key_suggests_the_nearest_key(key: str, form: str) -> None:
    said = refusal(*form.format(key).split())
    assert said == f"command line: unknown key '{key}'; did you mean '{UNKNOWN[key]}'?"


def test_the_message_for_a_key_without_a_near_match_lists_the_sections() -> None:
    said = refusal("--config.zzzzqqqq=1")
    assert "'zzzzqqqq'" in said
    for section in ("model", "loss", "optim", "data", "parallel", "checkpoint", "eval", "log"):
        assert section in said
    assert "model.d_model" in refusal("--config.model=1")  # a section: the message lists its keys


STRAY = ["steps=5", "--steps=5", "--optim.lr=5", "-config.optim.lrr=5", "--config", "--config.steps", "--config.steps="]


@pytest.mark.parametrize("argument", STRAY)
def test_an_argument_that_is_no_override_is_refused(argument: str) -> None:
    assert argument.split("=")[0].lstrip("-").removeprefix("config.") in refusal(argument)


WRONG = {
    "steps": ("many", "a whole number"),
    "batch_size": ("8.5", "a whole number"),
    "optim.lr": ("fast", "a number"),
    "optim.weight_decay": ("nan", "a number"),
    "optim.clip_norm": ("inf", "a number"),
    "model.qk_norm": ("maybe", "true or false"),
    "model.activation": ("silu", "one of gelu, relu, swiglu, geglu, relu2"),
    "optim.name": ("Adam", "one of adamw, adafactor, lion, muon, sgd"),
    "model.dtype": ("float64", "one of float32, bfloat16, float16"),
}


@pytest.mark.parametrize("key", WRONG)
def test_a_value_of_the_wrong_type_is_refused(key: str) -> None:
    value, allowed = WRONG[key]
    said = refusal(f"--config.{key}={value}")
    assert said.startswith(f"{key} is ") and value in said and said.endswith(f"; allowed: {allowed}")


# Saved configurations


def test_a_configuration_survives_a_round_trip_through_json(base: Config) -> None:
    tree = json.loads(json.dumps(dataclasses.asdict(base)))
    again = files.from_dict(tree)
    assert again == base and again is not base
    assert changes(base, again) == ({}, {})


def test_a_saved_configuration_with_wrong_keys_or_values_is_refused(base: Config) -> None:
    def said(change: Any) -> str:
        tree = dataclasses.asdict(base)
        change(tree)
        with pytest.raises(UserError) as caught:
            files.from_dict(tree, "some/config.json")
        return str(caught.value)

    unknown = said(lambda t: t["optim"].update(lrr=1.0))
    assert unknown == "some/config.json: unknown key 'optim.lrr'; did you mean 'optim.lr'?"
    assert said(lambda t: t["model"].pop("norm")) == "some/config.json: key 'model.norm' is missing"
    assert said(lambda t: t.pop("loss")) == "some/config.json: key 'loss' is missing"
    assert said(lambda t: t.update(loss=3)) == "some/config.json: 'loss' is 3; allowed: an object of keys"
    assert said(lambda t: t.update(steps="5")) == "steps is '5'; allowed: a whole number"
    assert said(lambda t: t.update(steps=0)) == "steps is 0; allowed: more than 0"


def test_load_workdir_reads_config_json_and_refuses_a_damaged_one(base: Config, tmp_path: Path) -> None:
    def said() -> str:
        with pytest.raises(UserError) as caught:
            files.load_workdir(tmp_path)
        return str(caught.value)

    assert "no config.json there" in said()
    saved = tmp_path / "config.json"
    saved.write_text("{half")
    assert "unreadable" in said()
    saved.write_bytes(b"\xff\xfe\x00")
    assert "unreadable" in said()
    saved.write_text("[]")
    assert "not the configuration of a run" in said()
    saved.write_text(json.dumps({"config": dataclasses.asdict(base), "versions": {}}))
    assert files.load_workdir(tmp_path) == base
    assert files.load_workdir(tmp_path, ["--config.seed=9"]).seed == 9


# Refusals are fast

NOT_NEEDED = ("jax", "jaxlib", "flax", "optax", "orbax", "tensorflow", "tensorflow_datasets")


@pytest.mark.parametrize(
    "statement, forbidden",
    [
        ("import jaxlm.config", NOT_NEEDED),
        ("import jaxlm.main", ("tensorflow", "tensorflow_datasets", "jax", "jaxlib")),
        (
            "from jaxlm import main; "
            f"assert main.exit_code(lambda: main.run(['--config={BASE}', '--config.lr=1'])) == 2",
            ("tensorflow", "jax", "jaxlib"),
        ),
    ],
)
def test_a_refusal_imports_no_device_library(statement: str, forbidden: tuple[str, ...]) -> None:
    code = f"{statement}\nimport sys\nprint([m for m in {forbidden!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "[]"
    for module in forbidden:  # a misspelled name would always pass the check above
        assert importlib.util.find_spec(module) is not None
