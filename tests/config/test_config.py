"""Which values of a configuration are accepted, which are refused, and what the messages say."""

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest

from jaxlm.config import Config, UserError, changes, files, schema
from jaxlm.config.validate import validate
from tests.configurations import BASE, refusal


@pytest.fixture
def base() -> Config:
    return files.load(BASE)


def test_base_names_every_key(base: Config) -> None:
    assert list(schema.flatten(base)) == list(schema.key_types())


def test_no_key_has_a_default() -> None:
    classes: list[Any] = [Config, *(f.type for f in schema.sections())]
    for cls in classes:
        for field in dataclasses.fields(cls):
            assert field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
            assert field.kw_only


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
def test_a_value_of_the_wrong_type_is_refused(base: Config, key: str, value: Any) -> None:
    *section, name = key.split(".")
    setattr(getattr(base, section[0]) if section else base, name, value)
    with pytest.raises(UserError, match="^" + re.escape(f"{key} is {value!r}; allowed: ")):
        validate(base)


# Overrides that are impossible, alone or together, the key that the message names, and a part of its "allowed" clause.
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
    ("model.head_dim=7", "model.head_dim", "an even head size"),
    ("model.rope_fraction=0.7", "model.rope_fraction", "an even part of a head's 64 channels"),  # 45 channels
    ("model.rope_fraction=1.5", "model.rope_fraction", "0 to 1"),
    ("model.rope_scaling=linear model.rope_factor=0.5", "model.rope_factor", "1 or more"),
    ("model.rope_scaling=llama3", "model.rope_original", "more than 1"),
    ("model.rope_scaling=longrope model.rope_original=9", "model.rope_short", "32 numbers"),
    ("model.global_every=2", "model.window", "more than 0"),
    ("model.rope_local_theta=9", "model.window", "more than 0"),
    (
        "model.attention=cudnn model.dtype=bfloat16 model.attention_softcap=1",
        "model.attention",
        "with attention_softcap, auto or xla",
    ),
    ("model.attention=triton model.dtype=bfloat16 model.window=9", "model.attention", "auto, xla or cudnn"),
    ("model.num_kv_heads=2", "model.num_kv_heads", "a divisor of model.num_heads = 3"),
    ("model.num_kv_heads=6", "model.num_kv_heads", "a divisor of model.num_heads = 3"),
    ("model.num_heads=64", "model.num_heads", "even head size"),  # heads of 3
    ("model.num_heads=1 model.d_model=7", "model.num_heads", "even head size"),
    ("model.num_heads=1 model.d_model=7 model.position=sinusoidal", "model.d_model", "even"),
    ("model.num_heads=96", "model.num_heads", "4 or more"),  # heads of 2
    ("model.num_heads=64 model.position=learned", "model.num_heads", "an even head size of 4 or more"),  # heads of 3
    ("model.num_layers=2000000000", "model.num_layers", "at most 10000"),
    ("optim.accum_steps=3", "batch_size", "a multiple of optim.accum_steps = 3"),
    ("steps=7 optim.warmup_steps=8", "optim.warmup_steps", "at most steps = 7"),
    ("optim.adam_lr=0", "optim.adam_lr", "optim.name=muon"),
    ("data.source=text", "data.path", "data.source=text"),
    ("data.source=tokens", "data.path", "data.source=tokens"),
    ("data.source=tfds", "data.tfds_name", "data.source=tfds"),
    ("data.source=jsonl", "data.path", "data.source=jsonl"),
    ("data.path=a", "data.path", "none with data.source=stdlib; text, jsonl, parquet, tokens, tfds have one"),
    ("data.source=synthetic data.path=a", "data.path", "none with data.source=synthetic"),
    ("data.val_path=a", "data.val_path", "none with data.source=stdlib; text, jsonl, parquet, tokens have one"),
    ("data.source=tfds data.tfds_name=x data.val_path=a", "data.val_path", "none with data.source=tfds"),
    ("data.source=parquet data.path=a data.text_key=", "data.text_key", "the key of a record's text"),
    ("data.source=tfds data.tfds_name=lm1b data.split=", "data.split", "name of a split"),
    ("data.val_fraction=0", "data.val_fraction", "more than 0"),
    ("data.val_fraction=1", "data.val_fraction", "less than 1"),
    ("data.vocab_size=299", "data.vocab_size", "at least 300"),
    ("data.source=synthetic data.vocab_size=1", "data.vocab_size", "at least 2"),
    ("checkpoint.resume=", "checkpoint.resume", "auto, never"),
]


@pytest.mark.parametrize("overrides, key, allowed", IMPOSSIBLE, ids=[row[0] for row in IMPOSSIBLE])
def test_impossible_values_are_refused(overrides: str, key: str, allowed: str) -> None:
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
    "model.num_heads=64 model.position=learned model.key_offset=false",  # heads of 3 are wrong with rope only
    "model.num_heads=3 model.d_model=9 model.position=learned model.key_offset=false",
    "optim.name=sgd optim.adam_lr=0",
    "data.tokenizer=bytes data.vocab_size=0",
    "data.source=text data.path=a data.val_path=b data.val_fraction=0",
    "data.source=synthetic data.vocab_size=2",
    "data.source=tfds data.tfds_name=x data.path=a",
    "seed=0",
    "seed=4294967294",
    "optim.b1=0 optim.b2=0 optim.weight_decay=0",
]


@pytest.mark.parametrize("overrides", POSSIBLE)
def test_possible_values_are_accepted(overrides: str) -> None:
    config = files.load(BASE, [f"--config.{o}" for o in overrides.split()])
    flat = schema.flatten(config)
    for override in overrides.split():
        key, value = override.split("=")
        assert flat[key] == (value == "true" if isinstance(flat[key], bool) else type(flat[key])(value))


# Resuming with another configuration

FREE_MODEL = {f"model.{k}" for k in ("dtype", "dropout", "lora_dropout", "remat", "attention")}
FREE_MODEL |= {"model.matmul_precision", "model.scan_unroll"}
PLACES = {"data.path", "data.val_path", "data.tokenizer_path"}  # a fingerprint ensures that the data is the same


def may_change(key: str) -> bool:
    section = key.split(".")[0]
    return (
        key
        in {
            "steps",
            "deterministic",  # how sums are taken
            "data.cache_dir",  # where tokens are stored
            *FREE_MODEL,
            *PLACES,
        }
        or section in {"loss", "parallel", "eval", "checkpoint", "log"}
        or (section == "optim" and key not in ("optim.name", "optim.freeze"))
    )


@pytest.mark.parametrize("key", list(schema.key_types()))
def test_changes_tells_whether_a_run_may_change_a_key(base: Config, key: str) -> None:
    other = files.from_dict(dataclasses.asdict(base))
    *section, name = key.split(".")
    holder = getattr(other, section[0]) if section else other
    old = getattr(holder, name)
    new = not old if isinstance(old, bool) else old + "x" if isinstance(old, str) else old + 1
    new = "1 stdlib" if key == "data.mixture" else new
    setattr(holder, name, new)
    one = {key: (old, new)}
    assert changes(base, other) == ((one, {}) if may_change(key) else ({}, one))


def test_a_run_may_not_change_these_keys() -> None:
    refused = {k for k in schema.key_types() if not may_change(k)}
    for key in ("seed", "batch_size", "seq_len", "optim.name", "model.d_model", "model.param_dtype", "data.mixture"):
        assert key in refused
    assert "data.vocab_size" in refused and "optim.lr" not in refused
