"""Validation scores against a float64 loop over the windows, one sequence at a time."""

import math
from functools import cache
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from jaxlm import step as steps
from jaxlm.cli import load
from jaxlm.config import Config
from jaxlm.data import eval_batches
from jaxlm.data.tokens import Tokens
from jaxlm.evaluate import evaluate
from jaxlm.model import make_model

CONFIG = Path(__file__).parents[1] / "configs/debug.py"
VOCAB, T, ROWS = 23, 8, 8
RTOL = 1e-5
TOKENS = (
    np.random.default_rng(0).integers(0, VOCAB, 2 * T * ROWS + 3 * T + 6).astype(np.uint16)
)  # 3 batches, 20 windows
BYTES = np.random.default_rng(1).integers(0, 9, VOCAB).astype(np.int32)


def make_config(*overrides: str) -> Config:
    base = [f"batch_size={ROWS}", f"seq_len={T}", "model.d_model=16", "model.scan_unroll=1"]
    return load(CONFIG, [f"--config.{o}" for o in (*base, *overrides)])


@cache
def model_and_params() -> tuple[Any, Any]:
    model = make_model(make_config().model, VOCAB, T)
    params = model.init(jax.random.key(0))
    # Other weights than at the start: a model without opinions scores all tokens alike.
    leaves, tree = jax.tree.flatten(params)
    rng = np.random.default_rng(2)
    return model, jax.tree.unflatten(tree, [x + rng.normal(size=x.shape).astype(np.float32) for x in leaves])


def score(
    devices: int, tokens: np.ndarray = TOKENS, limit: int = 0, table: np.ndarray | None = BYTES, **keys: Any
) -> Any:
    config = make_config(*(f"{k}={v}" for k, v in keys.items()))
    model, params = model_and_params()
    local = jax.devices()[:devices]
    step = steps.pmap_eval_step(steps.make_eval_step(config, model), local)
    return evaluate(step, params, eval_batches(Tokens([tokens]), config, ROWS, num_devices=devices, limit=limit), table)


@cache
def reference(num_targets: int) -> dict[str, float]:
    """In NumPy float64 from the logits, window by window; the last one is cut, not padded."""
    model, params = model_and_params()
    apply, (nll, correct, size) = jax.jit(model.apply), (0.0, 0, 0.0)
    for start in range(0, num_targets, T):
        stop = min(start + T, num_targets)
        logits = np.asarray(apply(params, TOKENS[None, start:stop].astype(np.int32))[0], np.float64)
        targets = TOKENS[start + 1 : stop + 1]
        log_z = np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1)) + logits.max(-1)
        nll += float(np.sum(log_z - logits[np.arange(len(targets)), targets]))
        correct += int(np.sum(logits.argmax(-1) == targets))
        size += float(BYTES[targets].sum())
    return {
        "eval_loss": nll / num_targets,
        "eval_perplexity": math.exp(nll / num_targets),
        "eval_bits_per_byte": nll / math.log(2) / size,
        "eval_accuracy": correct / num_targets,
        "eval_tokens": num_targets,
    }


@pytest.mark.parametrize("devices", [1, 2, 4, 8])
def test_every_target_counts_once_on_any_number_of_devices(devices: int):
    scores = score(devices)
    want = reference(len(TOKENS) - 1)
    assert 0.02 < want["eval_accuracy"] < 0.98  # else it would say little
    assert scores.keys() == want.keys()
    for key, value in want.items():
        assert scores[key] == pytest.approx(value, rel=RTOL), key
    assert scores["eval_tokens"] == len(TOKENS) - 1 and isinstance(scores["eval_tokens"], int)


def test_limit_is_the_score_of_the_first_batches():
    scores, want = score(2, limit=1), reference(ROWS * T)
    assert abs(want["eval_loss"] / reference(len(TOKENS) - 1)["eval_loss"] - 1) > 100 * RTOL
    for key, value in want.items():
        assert scores[key] == pytest.approx(value, rel=RTOL), key


@pytest.mark.parametrize("num_tokens", [2, T, T + 1, T + 2, ROWS * T + 1, ROWS * T + 2])
def test_awkward_lengths(num_tokens: int):
    scores = score(4, TOKENS[:num_tokens])
    assert scores["eval_tokens"] == num_tokens - 1
    assert scores["eval_loss"] == pytest.approx(reference(num_tokens - 1)["eval_loss"], rel=RTOL)


def test_no_bits_per_byte_without_text():
    scores = score(2, table=None)
    assert scores["eval_bits_per_byte"] is None
    assert scores["eval_loss"] == pytest.approx(reference(len(TOKENS) - 1)["eval_loss"], rel=RTOL)


def test_score_does_not_depend_on_how_it_was_trained():
    """Dropout, label smoothing, z-loss and chunks are of training; the score is the plain loss."""
    keys = {"model.dropout": 0.5, "loss.label_smoothing": 0.3, "loss.z_loss": 0.1, "loss.chunk": 5}
    assert score(2, **keys)["eval_loss"] == pytest.approx(reference(len(TOKENS) - 1)["eval_loss"], rel=RTOL)


def test_a_hopeless_model_has_a_finite_perplexity():
    model, params = model_and_params()
    worse = params | {"head": jax.tree.map(lambda x: 1e5 * x, params["head"])}
    config = make_config()
    step = steps.pmap_eval_step(steps.make_eval_step(config, model), jax.devices()[:1])
    scores = evaluate(step, worse, eval_batches(Tokens([TOKENS]), config, ROWS, num_devices=1), None)
    assert scores["eval_loss"] > 1000 and math.isfinite(scores["eval_perplexity"])
