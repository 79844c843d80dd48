"""Whole runs of a tiny model: the files that they write, and that they learn."""

import json
import math
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxlm import main
from jaxlm.checkpoint.writing import Saver
from jaxlm.config import UserError
from jaxlm.config.files import load
from jaxlm.config.paths import steps_in
from jaxlm.data.sources.synthetic import TRAIN as SYNTHETIC_TRAIN
from jaxlm.model import make_model
from jaxlm.train import step as train_step
from jaxlm.train.placement import Placement
from tests.exit_codes import tool
from tests.runs import (
    CHECKPOINT,
    CONFIG,
    ROOT,
    STEPS,
    assert_identical,
    flags,
    lines,
    numbers,
    run,
    state_of,
    text_keys,
    xla_flags,
)

# What a run writes


def test_metrics(whole: Path):
    train = [m for m in lines(whole) if "loss" in m]
    scores = [m for m in lines(whole) if "eval_loss" in m]
    assert len(train) + len(scores) == len(lines(whole))
    keys = {
        "step",
        "time",
        "loss",
        "loss_mean",
        "lr",
        "grad_norm",
        "skipped",
        "spikes",
        "tokens",
        "tokens_per_second",
        "step_seconds",
        "mfu",
        "peak_memory_bytes",
        "epochs",
    }
    assert all(m.keys() == keys for m in train)
    per_epoch = (SYNTHETIC_TRAIN - 1) // 16  # rows
    assert all(m["epochs"] == pytest.approx(m["step"] * 8 / per_epoch) for m in train)
    assert [m["step"] for m in train] == [1, *range(10, STEPS + 1, 10)]
    assert all(m["tokens"] == m["step"] * 8 * 16 for m in train)
    assert all(m["tokens_per_second"] == pytest.approx(128 / m["step_seconds"]) and m["mfu"] is None for m in train)
    assert sorted(m["time"] for m in train) == [m["time"] for m in train] and abs(time.time() - train[0]["time"]) < 7200
    keys = {"step", "time", "eval_loss", "eval_perplexity", "eval_bits_per_byte", "eval_accuracy", "eval_tokens"}
    assert all(m.keys() == keys for m in scores)
    assert [m["step"] for m in scores] == [150, 300, 450, 600]
    assert [m["step"] for m in lines(whole)] == sorted(m["step"] for m in lines(whole))


def test_config_and_checkpoints(whole: Path):
    saved = json.loads((whole / "config.json").read_text())
    assert saved["config"]["optim"]["lr"] == 0.003 and saved["history"] == []
    assert {"jaxlm", "jax", "flax", "python", "git_commit"} <= saved["versions"].keys()
    assert sorted(int(p.name) for p in (whole / "checkpoints").iterdir()) == list(range(0, STEPS + 1, CHECKPOINT))
    config = load(CONFIG, flags())
    fresh = train_step.init_state(config, make_model(config.model, 64, config.seq_len), 2)
    assert_identical(state_of(whole, 0), jax.device_get(fresh))
    assert [int(state_of(whole, s).step) for s in (0, 100, 600)] == [0, 100, 600]


def test_config_json_is_enough_to_run_it_again(short: Path, tmp_path: Path):
    """The same numbers, bit for bit."""
    with pytest.raises(UserError, match="--workdir is not given"):
        main.run(["--config", str(short / "config.json")])
    assert main.run(["--config", str(short / "config.json"), "--workdir", str(tmp_path / "again")]) == 0
    assert numbers(tmp_path / "again") == numbers(short)
    assert_identical(state_of(tmp_path / "again", CHECKPOINT), state_of(short, CHECKPOINT))


def test_a_saved_state_is_that_of_its_step_although_the_loop_continued(whole: Path, short: Path):
    """The longer run wrote this checkpoint while the next steps overwrote the donated arrays."""
    assert_identical(state_of(whole, CHECKPOINT), state_of(short, CHECKPOINT))
    assert not np.array_equal(
        state_of(whole, 2 * CHECKPOINT).params["embed"]["embedding"],
        state_of(whole, CHECKPOINT).params["embed"]["embedding"],
    )


def test_newest_and_best_checkpoints_are_kept(tmp_path: Path):
    config = load(CONFIG, flags(checkpoint__keep=2, checkpoint__keep_best=1))
    state = Placement(config, make_model(config.model, 64, config.seq_len), jax.devices()[:2]).initial()
    saver = Saver(tmp_path, config.checkpoint)
    for step, loss in enumerate([None, 3.0, 1.0, 2.0, None, 5.0, None]):
        if loss is not None:
            saver.scored(step, loss)
        saver.save(step, state)
        saver.wait()
    assert steps_in(tmp_path / "checkpoints") == [2, 5, 6]
    saver.close()
    # A resumed run knows the best checkpoint from its metrics.
    (tmp_path / "metrics.jsonl").write_text('{"step": 2, "eval_loss": 1.0}\n{"step": 5, "eval_loss": 5.0}\n{"step": 6')
    saver = Saver(tmp_path, config.checkpoint)
    for step in (7, 8, 9):
        saver.save(step, state)
        saver.wait()
    assert steps_in(tmp_path / "checkpoints") == [2, 8, 9]
    saver.close()


# Learning


def test_it_overfits_one_batch(tmp_path: Path):
    """The corpus is one batch, so each epoch is one step on the same sequences."""
    tokens = np.random.default_rng(0).permutation(np.arange(8 * 8 + 1)).astype(np.uint16)
    for name in ("train.npy", "val.npy"):
        np.save(tmp_path / name, tokens)
    keys = {
        "data.source": "tokens",
        "data.path": tmp_path / "train.npy",
        "data.val_path": tmp_path / "val.npy",
        "data.vocab_size": 65,
        "seq_len": 8,
        "model.dropout": 0,
        "optim.lr": 0.02,
        "checkpoint.every_steps": 0,
        "eval.every_steps": 0,
        "optim.ema_decay": 0,
        "steps": 100,
    }
    assert run(tmp_path / "run", **keys) == 0
    losses = {m["step"]: m["loss"] for m in lines(tmp_path / "run") if "loss" in m}
    assert losses[1] == pytest.approx(math.log(65), rel=0.1)
    assert losses[100] < 0.02
    last = lines(tmp_path / "run")[-1]
    assert last["eval_loss"] < 0.02 and last["eval_accuracy"] == 1.0 and last["eval_tokens"] == 64


def test_loss_on_synthetic_data_approaches_the_best_possible(tmp_path: Path):
    keys = {
        "model.d_model": 32,
        "model.dropout": 0,
        "optim.lr": 0.02,
        "batch_size": 16,
        "seq_len": 32,
        "steps": 400,
        "optim.schedule": "linear",
        "eval.every_steps": 0,
        "checkpoint.every_steps": 0,
    }
    assert run(tmp_path / "run", **keys) == 0
    loss = lines(tmp_path / "run")[-1]["eval_loss"]
    assert math.log(4) * 0.99 < loss < math.log(4) * 1.05


# The commands on a run


def test_evaluate_gives_the_score_of_the_run(whole: Path, capsys: pytest.CaptureFixture[str]):
    assert tool("evaluate", "--workdir", whole) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found == numbers(whole)[-1]
    assert tool("evaluate", "--workdir", whole, "--step", 300, "--config.parallel.devices=4") == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    want = next(m for m in numbers(whole) if m["step"] == 300 and "eval_loss" in m)
    assert found.pop("eval_bits_per_byte") is want.pop("eval_bits_per_byte") is None
    assert found == pytest.approx(want, rel=1e-5)


def test_text_run_and_generate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    keys = text_keys(tmp_path) | {"log.tensorboard": True}
    assert run(tmp_path / "run", **keys) == 0
    shown = capsys.readouterr().out
    assert "bits per byte" in shown and "this model" in shown and "│" in shown
    next_command = shlex.split(shown.splitlines()[-1].removeprefix("next: "))
    assert list((tmp_path / "run/tensorboard").glob("events.out.tfevents.*"))
    score = lines(tmp_path / "run")[-1]
    # The tokens are bytes, and the start of the document is not a target.
    assert score["eval_bits_per_byte"] == pytest.approx(score["eval_loss"] / math.log(2), rel=0.02)

    def sample(seed: int) -> str:
        arguments = ["--prompt", "the ", "--max_new_tokens", 20, "--seed", seed]
        assert tool("generate", "--workdir", tmp_path / "run", *arguments) == 0
        return capsys.readouterr().out

    # The printed next command works.
    shown = subprocess.run([*next_command, "--max_new_tokens", "5"], capture_output=True, text=True, timeout=120)
    assert shown.returncode == 0 and shown.stdout.startswith("def"), (next_command, shown)

    first = sample(1)
    assert first.startswith("the ") and first == sample(1) != sample(2)

    # On a machine with fewer devices than the run used.
    alone = {"XLA_FLAGS": xla_flags(1)}
    arguments = ["--workdir", tmp_path / "run", "--prompt", "the ", "--max_new_tokens", "20", "--seed", "1"]
    shown = subprocess.run(
        [sys.executable, ROOT / "tools/generate.py", *arguments],
        env=os.environ | alone,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert (shown.returncode, shown.stderr, shown.stdout) == (0, "", first)
