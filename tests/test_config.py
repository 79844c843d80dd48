"""The configuration: what is accepted, what is refused, and how the refusal reads."""

import dataclasses
import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pytest

from jaxlm import cli
from jaxlm import config as configs
from jaxlm.config import Config, UserError

ROOT = Path(__file__).resolve().parents[1]
BASE = ROOT / "configs" / "base.py"


@pytest.fixture
def base() -> Config:
    return cli.load(BASE)


def refusal(*overrides: str, path: Path = BASE) -> str:
    """The one line with which the overrides are refused."""
    with pytest.raises(UserError) as caught:
        cli.load(path, list(overrides))
    message = str(caught.value)
    assert "\n" not in message
    return message


# The files


def test_base_names_every_key(base: Config) -> None:
    assert list(configs.flatten(base)) == list(configs.key_types())


def test_every_key_must_be_given() -> None:
    for cls in [Config, *(f.type for f in dataclasses.fields(Config) if dataclasses.is_dataclass(f.type))]:
        for field in dataclasses.fields(cls):  # type: ignore[arg-type]
            assert field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
            assert field.kw_only


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.py")), ids=lambda p: p.stem)
def test_every_file_loads(path: Path) -> None:
    needs_data = ["--config.data.path=corpus.txt"] if "--config.data.path" in path.read_text() else []
    assert configs.flatten(cli.load(path, needs_data)).keys() == configs.key_types().keys()


def test_a_file_works_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine").mkdir()
    path = tmp_path / "mine" / "small.py"
    path.write_text(
        "from configs import base\ndef get_config():\n    c = base.get_config()\n    c.steps = 55\n    return c\n"
    )
    monkeypatch.chdir(tmp_path)
    before = list(sys.path)
    assert cli.load("mine/small.py").steps == 55
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
def test_a_broken_file(tmp_path: Path, line: str, said: str) -> None:
    path = tmp_path / "mine.py"
    path.write_text(
        f"from configs import base\ndef get_config():\n    c = base.get_config()\n    {line}\n    return c\n"
    )
    assert re.search(said, refusal(path=path)), refusal(path=path)


def test_a_file_that_is_not_a_configuration(tmp_path: Path) -> None:
    assert "no such file" in refusal(path=tmp_path / "none.py")
    assert "no such file" in refusal(path=tmp_path)  # a folder
    (tmp_path / "empty.py").write_text("")
    assert "get_config" in refusal(path=tmp_path / "empty.py")
    (tmp_path / "config.json").write_text("{}")
    assert "not a Python file" in refusal(path=tmp_path / "config.json")


# Overrides


def test_overrides_of_every_type(base: Config) -> None:
    args = [
        "--config.steps=77",
        "--config.batch_size", "16",
        "--config.optim.lr=3e-4",
        "--config.optim.clip_norm=2",  # a float written as a whole number
        "--config.deterministic=true",
        "--config.model.tie_embeddings",
        "--noconfig.model.qk_norm",
        "--config.log.tensorboard=False",
        "--config.model.activation=swiglu",
        "--config.model.position", "learned",
        "--config.eval.sample_prompt=x = 'a b'",
        "--config.data.cache_dir=",
    ]  # fmt: skip
    got = cli.load(BASE, args)
    expected = {
        "steps": 77, "batch_size": 16, "optim.lr": 3e-4, "optim.clip_norm": 2.0, "deterministic": True,
        "model.tie_embeddings": True, "model.qk_norm": False, "log.tensorboard": False, "model.activation": "swiglu",
        "model.position": "learned", "eval.sample_prompt": "x = 'a b'",
    }  # fmt: skip
    assert configs.flatten(got) == configs.flatten(base) | expected
    differ = {k for k, v in expected.items() if configs.flatten(base)[k] != v}
    assert differ == set(expected)
    for key, kind in configs.key_types().items():
        if get_origin(kind) is not Literal:
            assert type(configs.flatten(got)[key]) is kind, key


def test_overrides_leave_the_given_configuration_alone(base: Config) -> None:
    before = configs.flatten(base)
    assert cli.apply_overrides(base, ["--config.optim.lr=0.5"]).optim.lr == 0.5
    assert configs.flatten(base) == before


def test_every_choice_can_be_set(base: Config) -> None:
    choices = {k: get_args(t) for k, t in configs.key_types().items() if get_origin(t) is Literal}
    assert len(choices) > 10
    extra = ["--config.data.path=x", "--config.data.tfds_name=lm1b"]
    for key, values in choices.items():
        for value in values:
            config = cli.apply_overrides(base, [*extra, f"--config.{key}={value}"])
            assert configs.flatten(config)[key] == value


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
def test_an_unknown_key_names_the_nearest(key: str, form: str) -> None:
    said = refusal(*form.format(key).split())
    assert said == f"command line: unknown key '{key}'; did you mean '{UNKNOWN[key]}'?"


def test_a_key_like_no_other_names_the_sections() -> None:
    said = refusal("--config.zzzzqqqq=1")
    assert "'zzzzqqqq'" in said
    for section in ("model", "loss", "optim", "data", "parallel", "checkpoint", "eval", "log"):
        assert section in said
    assert "model.d_model" in refusal("--config.model=1")  # a section: its keys


STRAY = ["steps=5", "--steps=5", "--optim.lr=5", "-config.optim.lrr=5", "--config", "--config.steps", "--config.steps="]


@pytest.mark.parametrize("argument", STRAY)
def test_what_is_no_override_is_refused(argument: str) -> None:
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
def test_a_wrong_type_on_the_command_line(key: str) -> None:
    value, allowed = WRONG[key]
    said = refusal(f"--config.{key}={value}")
    assert said.startswith(f"{key} is ") and value in said and said.endswith(f"; allowed: {allowed}")


WRONG_VALUES = [
    ("steps", 5.0),
    ("steps", True),
    ("deterministic", 1),
    ("optim.lr", True),
    ("optim.lr", "3e-4"),
    ("optim.lr", float("nan")),
    ("optim.eps", float("-inf")),
    ("data.path", None),
    ("data.path", Path("x")),
    ("model.norm", None),
    ("model.norm", ["rmsnorm"]),
]


@pytest.mark.parametrize("key, value", WRONG_VALUES)
def test_a_wrong_type_in_a_file(base: Config, key: str, value: Any) -> None:
    *section, name = key.split(".")
    setattr(getattr(base, section[0]) if section else base, name, value)
    with pytest.raises(UserError, match="^" + re.escape(f"{key} is {value!r}; allowed: ")):
        configs.validate(base)


# How the values go together: overrides, the key that is named, a part of what is said to be allowed.
IMPOSSIBLE = [
    ("steps=0", "steps", "more than 0"),
    ("seq_len=-5", "seq_len", "more than 0"),
    ("optim.lr=0", "optim.lr", "more than 0"),
    ("model.num_heads=0", "model.num_heads", "more than 0"),
    ("checkpoint.keep=0", "checkpoint.keep", "more than 0"),
    ("optim.weight_decay=-0.1", "optim.weight_decay", "0 or more"),
    ("eval.batches=-1", "eval.batches", "0 or more"),
    ("model.dropout=1", "model.dropout", "less than 1"),
    ("loss.label_smoothing=1.5", "loss.label_smoothing", "less than 1"),
    ("optim.ema_decay=1", "optim.ema_decay", "less than 1"),
    ("optim.b2=1", "optim.b2", "less than 1"),
    ("optim.min_lr_ratio=1.1", "optim.min_lr_ratio", "0 to 1"),
    ("optim.decay_fraction=1.1", "optim.decay_fraction", "0 to 1"),
    ("model.num_heads=5", "model.num_heads", "a divisor of model.d_model = 192"),
    ("model.num_kv_heads=2", "model.num_kv_heads", "a divisor of model.num_heads = 3"),
    ("model.num_kv_heads=6", "model.num_kv_heads", "a divisor of model.num_heads = 3"),
    ("model.num_heads=64", "model.num_heads", "even head size"),  # heads of 3
    ("model.num_heads=1 model.d_model=7", "model.num_heads", "even head size"),
    ("model.num_heads=1 model.d_model=7 model.position=sinusoidal", "model.d_model", "even"),
    ("optim.accum_steps=3", "batch_size", "a multiple of optim.accum_steps = 3"),
    ("steps=7 optim.warmup_steps=8", "optim.warmup_steps", "at most steps = 7"),
    ("optim.adam_lr=0", "optim.adam_lr", "optim.name=muon"),
    ("data.source=text", "data.path", "data.source=text"),
    ("data.source=tokens", "data.path", "data.source=tokens"),
    ("data.source=tfds", "data.tfds_name", "data.source=tfds"),
    ("data.source=tfds data.tfds_name=lm1b data.split=", "data.split", "name of a split"),
    ("data.val_fraction=0", "data.val_fraction", "more than 0"),
    ("data.val_fraction=1", "data.val_fraction", "less than 1"),
    ("data.vocab_size=299", "data.vocab_size", "at least 300"),
    ("data.source=synthetic data.vocab_size=1", "data.vocab_size", "at least 2"),
    ("checkpoint.resume=", "checkpoint.resume", "auto, never"),
]


@pytest.mark.parametrize("overrides, key, allowed", IMPOSSIBLE, ids=[row[0] for row in IMPOSSIBLE])
def test_an_impossible_combination(overrides: str, key: str, allowed: str) -> None:
    args = [f"--config.{o}" for o in overrides.split()]
    said = refusal(*args)
    found = re.fullmatch(r"([\w.]+) is (.+); allowed: (.+)", said)
    assert found and found[1] == key and allowed in found[3], said
    value = dict(o.split("=") for o in overrides.split()).get(key)
    assert value is None or found[2].strip("'") in (value, f"{value}.0"), said


POSSIBLE = [
    "steps=7 optim.warmup_steps=7",
    "optim.accum_steps=4",
    "model.num_heads=6 model.num_kv_heads=2",
    "model.num_heads=64 model.position=learned",  # heads of 3 are wrong with rope only
    "model.num_heads=3 model.d_model=9 model.position=learned",
    "optim.name=sgd optim.adam_lr=0",
    "data.tokenizer=bytes data.vocab_size=0",
    "data.source=text data.path=a data.val_path=b data.val_fraction=0",
    "data.source=synthetic data.vocab_size=2",
    "seed=0",
    "seed=4294967294",
    "optim.b1=0 optim.b2=0 optim.weight_decay=0",
]


@pytest.mark.parametrize("overrides", POSSIBLE)
def test_a_possible_combination(overrides: str) -> None:
    config = cli.load(BASE, [f"--config.{o}" for o in overrides.split()])
    flat = configs.flatten(config)
    for override in overrides.split():
        key, value = override.split("=")
        assert type(flat[key])(value) == flat[key]


# Saved configurations


def test_round_trip(base: Config) -> None:
    tree = json.loads(json.dumps(dataclasses.asdict(base)))
    again = cli.from_dict(tree)
    assert again == base and again is not base
    assert configs.changes(base, again) == ({}, {})


def test_a_saved_configuration_that_does_not_fit(base: Config) -> None:
    def said(change: Any) -> str:
        tree = dataclasses.asdict(base)
        change(tree)
        with pytest.raises(UserError) as caught:
            cli.from_dict(tree, "some/config.json")
        return str(caught.value)

    unknown = said(lambda t: t["optim"].update(lrr=1.0))
    assert unknown == "some/config.json: unknown key 'optim.lrr'; did you mean 'optim.lr'?"
    assert said(lambda t: t["model"].pop("norm")) == "some/config.json: key 'model.norm' is missing"
    assert said(lambda t: t.pop("loss")) == "some/config.json: key 'loss' is missing"
    assert said(lambda t: t.update(loss=3)) == "some/config.json: 'loss' is 3; allowed: an object of keys"
    assert said(lambda t: t.update(steps="5")) == "steps is '5'; allowed: a whole number"
    assert said(lambda t: t.update(steps=0)) == "steps is 0; allowed: more than 0"


def test_load_workdir(base: Config, tmp_path: Path) -> None:
    def said() -> str:
        with pytest.raises(UserError) as caught:
            cli.load_workdir(tmp_path)
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
    assert cli.load_workdir(tmp_path) == base
    assert cli.load_workdir(tmp_path, ["--config.seed=9"]).seed == 9


# Going on with another configuration

FREE_MODEL = {"model.dtype", "model.dropout", "model.remat", "model.attention", "model.scan_unroll"}


def may_change(key: str) -> bool:
    section = key.split(".")[0]
    return (
        key in {"steps", "deterministic", "data.cache_dir", *FREE_MODEL}  # where tokens are stored, how sums are taken
        or section in {"loss", "parallel", "eval", "checkpoint", "log"}
        or (section == "optim" and key != "optim.name")
    )


@pytest.mark.parametrize("key", list(configs.key_types()))
def test_changes_of_each_key(base: Config, key: str) -> None:
    other = cli.from_dict(dataclasses.asdict(base))
    *section, name = key.split(".")
    holder = getattr(other, section[0]) if section else other
    old = getattr(holder, name)
    new = not old if isinstance(old, bool) else old + "x" if isinstance(old, str) else old + 1
    setattr(holder, name, new)
    one = {key: (old, new)}
    assert configs.changes(base, other) == ((one, {}) if may_change(key) else ({}, one))


def test_what_a_run_may_not_change_is_known() -> None:
    refused = {k for k in configs.key_types() if not may_change(k)}
    for key in ("seed", "batch_size", "seq_len", "optim.name", "model.d_model", "model.param_dtype", "data.path"):
        assert key in refused
    assert "data.vocab_size" in refused and "optim.lr" not in refused


# Fast to refuse

NOT_NEEDED = ("jax", "jaxlib", "flax", "optax", "orbax", "tensorflow", "tensorflow_datasets")


@pytest.mark.parametrize(
    "statement, forbidden",
    [
        ("import jaxlm.config", NOT_NEEDED),
        ("import jaxlm.main", ("tensorflow", "tensorflow_datasets", "jax", "jaxlib")),
        (f"from jaxlm import main; assert main.exit_code(lambda: main.run(['--config={BASE}', '--config.lr=1'])) == 2",
         ("tensorflow", "jax", "jaxlib")),
    ],
)  # fmt: skip
def test_a_refusal_needs_no_device_library(statement: str, forbidden: tuple[str, ...]) -> None:
    code = f"{statement}\nimport sys\nprint([m for m in {forbidden!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "[]"
    for module in forbidden:  # or the test would pass by a wrong name
        assert importlib.util.find_spec(module) is not None
