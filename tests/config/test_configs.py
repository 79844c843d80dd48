"""Every file in configs/ loads and trains a few steps, with large sizes made small and all features kept."""

import importlib
import json
import math
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxlm.checkpoint import workdirs
from jaxlm.checkpoint.reading import Checkpoints
from jaxlm.config import flatten
from jaxlm.config.files import load
from jaxlm.run import training
from jaxlm.train import trained

FILES = sorted(p for p in (Path(__file__).parents[2] / "configs").glob("*.py") if p.stem != "__init__")
STEPS = 4  # a layer that starts at zero lets gradients through only after its first update
SMALL = {
    "steps": STEPS,
    "log.every_steps": 1,
    "batch_size": 8,
    "seq_len": 16,
    "model.num_layers": 2,
    "model.d_model": 32,
    "model.num_heads": 4,
    "optim.warmup_steps": 1,
    "optim.accum_steps": 2,
    "loss.chunk": 0,
    "data.source": "synthetic",
    "data.vocab_size": 64,
    "parallel.devices": 2,
    "eval.batches": 1,
    "checkpoint.keep": 2,
    "log.tensorboard": False,
}


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_each_file_loads(path: Path):
    config = load(path, some_path(path))
    assert config.batch_size % config.optim.accum_steps == 0
    assert path.read_text().startswith('"""')


def some_path(path: Path) -> list[str]:
    """Returns the override of data.path, which a configuration of files requires and others refuse."""
    data = importlib.import_module(f"configs.{path.stem}").get_config().data
    return ["--config.data.path=some/path"] * (data.source in ("text", "jsonl"))


def flatten_of(path: Path) -> dict[str, object]:
    return flatten(load(path, some_path(path)))


LONG = ("lora_8b", "seq2seq")  # test_finetuning.py and test_documents.py train such models, too


@pytest.mark.parametrize("path", [pytest.param(p, id=p.stem, marks=[pytest.mark.ci] * (p.stem in LONG)) for p in FILES])
def test_each_file_trains(path: Path, tmp_path: Path):
    full = flatten_of(path)
    small = dict(SMALL)
    if full["model.num_kv_heads"]:
        small["model.num_kv_heads"] = 2
    if full["model.d_ff"]:
        small["model.d_ff"] = 48
    if full["loss.chunk"]:
        small["loss.chunk"] = 24  # does not divide the 32 tokens of a micro-batch
    if full["optim.accum_steps"] == 1:
        small["optim.accum_steps"] = 1
    if full["data.source"] == "tfds":
        small |= {"data.val_split": ""}
    small |= {"data.path": ""} if full["data.path"] else {}  # synthetic data has no path
    if full["model.encoder_layers"]:  # synthetic data has no prompts
        records = [{full["data.prompt_key"]: f"number {i}", full["data.response_key"]: f"{i:b}"} for i in range(200)]
        (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
        small |= {"data.source": "jsonl", "data.path": str(tmp_path / "pairs.jsonl"), "data.tokenizer": "bytes"}
        small |= {"model.encoder_len": 32, "data.cache_dir": str(tmp_path)}
    if full["data.messages_key"]:
        small |= {"data.messages_key": "", "data.chat_template": "", "data.packing": "concat"}
    if full["model.lora_rank"]:  # LoRA is trained beside the weights of another run
        small |= {"model.lora_rank": 4, "checkpoint.resume": str(tmp_path / "weights")}
        without = small | {"model.lora_rank": 0, "checkpoint.resume": "auto"}
        before = load(path, [*some_path(path), *(f"--config.{k}={v}" for k, v in without.items())])
        assert training.run(before, tmp_path / "weights") == 0
    config = load(path, [*some_path(path), *(f"--config.{k}={v}" for k, v in small.items())])
    kept = {k: v for k, v in flatten(config).items() if k not in small}
    assert kept.items() <= full.items(), "all else is as in the file"
    assert training.run(config, tmp_path / "run") == 0

    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    losses = [m["loss"] for m in lines if "loss" in m]
    # The logits of an untrained model are of size 1 at most, which adds up to half a nat to ln V.
    vocab_size = workdirs.read_facts(tmp_path / "run")["vocab_size"]
    assert abs(losses[0] - math.log(vocab_size)) < (1 if config.model.lora_rank else 0.5) and len(losses) == STEPS
    assert lines[-1]["step"] == STEPS and math.isfinite(lines[-1]["eval_loss"])
    checkpoints = Checkpoints(tmp_path / "run")
    before, after = (checkpoints.restore_params(step, ema=False) for step in (0, STEPS))
    checkpoints.close()
    for (key, a), b in zip(jax.tree_util.tree_leaves_with_path(before), jax.tree.leaves(after), strict=True):
        learns = trained.trains(config, "/".join(k.key for k in key))
        assert a.dtype == b.dtype == (np.float32 if learns else config.model.param_dtype)
        assert np.isfinite(b).all() and np.array_equal(a, b) != learns, f"{key} learns or not"


def test_the_files_differ_in_their_features():
    """The files have different values of these keys, so the small runs above cover different features."""
    everything = [flatten_of(path) for path in FILES]
    for key, at_least in (("model.dtype", 2), ("model.scan_unroll", 2), ("loss.chunk", 2), ("optim.name", 2),
                          ("optim.schedule", 3), ("model.position", 2), ("model.activation", 3),
                          ("optim.accum_steps", 3), ("model.num_kv_heads", 2), ("data.source", 4)):  # fmt: skip
        assert len({c[key] for c in everything}) >= at_least, key
