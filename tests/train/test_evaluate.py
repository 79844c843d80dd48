"""Compares validation scores with a float64 loop over the windows, one sequence at a time."""

import math
from functools import cache
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from jaxlm.config import Config
from jaxlm.config.files import load
from jaxlm.data import Share, eval_batches
from jaxlm.model import make_model
from jaxlm.train import step as train_step
from jaxlm.train.evaluate import evaluate
from jaxlm.train.placement import Placement
from tests.corpora import corpus_of
from tests.decoders import logits_of

CONFIG = Path(__file__).parents[2] / "configs/debug.py"
VOCAB, T, ROWS = 23, 8, 8
RTOL = 1e-5
# 3 batches, 20 windows.
TOKENS = np.random.default_rng(0).integers(0, VOCAB, 2 * T * ROWS + 3 * T + 6).astype(np.uint16)
BYTES = np.random.default_rng(1).integers(0, 9, VOCAB).astype(np.int32)


def make_config(*overrides: str) -> Config:
    base = [f"batch_size={ROWS}", f"seq_len={T}", "model.d_model=16", "model.scan_unroll=1"]
    return load(CONFIG, [f"--config.{o}" for o in (*base, *overrides)])


@cache
def model_and_params() -> tuple[Any, Any]:
    model = make_model(make_config().model, VOCAB, T)
    params = model.init(jax.random.key(0))
    # Adds noise, because an untrained model scores all tokens alike.
    leaves, tree = jax.tree.flatten(params)
    rng = np.random.default_rng(2)
    return model, jax.tree.unflatten(tree, [x + rng.normal(size=x.shape).astype(np.float32) for x in leaves])


def score(devices: int, *sets: np.ndarray, limit: int = 0, table: np.ndarray | None = BYTES, **keys: Any) -> Any:
    config = make_config(*(f"{k}={v}" for k, v in keys.items()))
    model, params = model_and_params()
    local = jax.devices()[:devices]
    step = train_step.pmap_eval_step(config, train_step.make_eval_step(config, model, local), local)
    params = Placement(config, model, local).place_params(params)
    corpus = corpus_of(*(sets or (TOKENS,)))
    share = Share(devices, of_a_replica=config.parallel.of_a_replica)
    return evaluate(step, params, eval_batches(corpus, config, ROWS, share=share, limit=limit), table)


@cache
def reference(num_targets: int, starts: tuple[int, ...] | None = None) -> dict[str, float]:
    """Computes the scores in NumPy float64 from the logits, window by window. The last window is cut, not padded."""
    model, params = model_and_params()
    apply, (nll, correct, size) = jax.jit(logits_of(model)), (0.0, 0, 0.0)
    for start in starts or range(0, num_targets, T):
        stop = min(start + T, num_targets)
        logits = np.asarray(apply(params, TOKENS[None, start:stop].astype(np.int32))[0], np.float64)
        targets = TOKENS[start + 1 : stop + 1]
        log_z = np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1)) + logits.max(-1)
        nll += float(np.sum(log_z - logits[np.arange(len(targets)), targets]))
        correct += int(np.sum(logits.argmax(-1) == targets))
        size += float(BYTES[targets].sum())
    count = len(starts) * T if starts else num_targets
    return {
        "eval_loss": nll / count,
        "eval_perplexity": math.exp(nll / count),
        "eval_bits_per_byte": nll / math.log(2) / size,
        "eval_accuracy": correct / count,
        "eval_tokens": count,
    }


GRID = {"parallel.tensor": 2, "parallel.context": 2, "parallel.pipeline": 2}


@pytest.mark.parametrize("devices, keys", [(1, {}), (2, {}), (4, {}), (8, {}), (8, GRID)])
def test_every_target_counts_once_on_any_number_of_devices(devices: int, keys: dict[str, Any]):
    scores = score(devices, **keys)
    want = reference(len(TOKENS) - 1)
    assert 0.02 < want["eval_accuracy"] < 0.98  # otherwise it would test little
    assert scores.keys() == want.keys()
    for key, value in want.items():
        assert scores[key] == pytest.approx(value, rel=RTOL), key
    assert scores["eval_tokens"] == len(TOKENS) - 1 and isinstance(scores["eval_tokens"], int)


@pytest.mark.parametrize("devices", [1, 4])
def test_a_limit_scores_windows_spread_over_the_set(devices: int):
    scores = score(devices, limit=1)
    want = reference(len(TOKENS) - 1, tuple(i * 20 // ROWS * T for i in range(ROWS)))  # of 20 windows
    prefix = reference(len(TOKENS) - 1, tuple(i * T for i in range(ROWS)))
    assert abs(want["eval_loss"] / prefix["eval_loss"] - 1) > 100 * RTOL
    for key, value in want.items():
        assert scores[key] == pytest.approx(value, rel=RTOL), key


@pytest.mark.parametrize("devices", [1, 4])
def test_sources_of_a_mixture_have_losses_of_their_own(devices: int):
    """Each equals the loss of its source scored alone, and the total is the mean over all targets."""
    cut = ROWS * T + 3  # the first has 8 windows and a remainder, the second 11 and a remainder
    sets = (TOKENS[:cut], TOKENS[cut:])
    both, alone = score(devices, *sets), [score(devices, tokens) for tokens in sets]
    assert [both["eval_loss/a"], both["eval_loss/b"]] == [a["eval_loss"] for a in alone]
    counts = np.array([len(tokens) - 1 for tokens in sets])
    assert both["eval_tokens"] == counts.sum()
    for key in ("eval_loss", "eval_accuracy"):
        assert both[key] == pytest.approx(np.average([a[key] for a in alone], weights=counts), rel=RTOL)
    assert not any("/" in key for key in alone[0])


def test_a_few_batches_of_a_mixture_estimate_the_loss_of_all_its_targets():
    """The sources have 4 and 12 windows. One batch of each is weighted by the number of windows of its source."""
    sets = (TOKENS[: 4 * T + 1], TOKENS[6 * T : 18 * T + 1])
    scores, alone = score(2, *sets, limit=1), [score(2, tokens, limit=1) for tokens in sets]
    assert scores["eval_tokens"] == (4 + 8) * T
    assert scores["eval_loss"] == pytest.approx((4 * alone[0]["eval_loss"] + 12 * alone[1]["eval_loss"]) / 16, rel=RTOL)
    plain = (4 * alone[0]["eval_loss"] + 8 * alone[1]["eval_loss"]) / 12
    assert abs(scores["eval_loss"] / plain - 1) > 100 * RTOL


@pytest.mark.parametrize("num_tokens", [2, T, T + 1, T + 2, ROWS * T + 1, ROWS * T + 2])
def test_awkward_lengths(num_tokens: int):
    scores = score(4, TOKENS[:num_tokens])
    assert scores["eval_tokens"] == num_tokens - 1
    assert scores["eval_loss"] == pytest.approx(reference(num_tokens - 1)["eval_loss"], rel=RTOL)


def test_no_bits_per_byte_without_text():
    scores = score(2, table=None)
    assert scores["eval_bits_per_byte"] is None
    assert scores["eval_loss"] == pytest.approx(reference(len(TOKENS) - 1)["eval_loss"], rel=RTOL)


def test_the_score_does_not_depend_on_training_options():
    """The score is the plain loss, without dropout, label smoothing and z-loss, and whatever the chunk size."""
    keys = {"model.dropout": 0.5, "loss.label_smoothing": 0.3, "loss.z_loss": 0.1, "loss.chunk": 5}
    assert score(2, **keys)["eval_loss"] == pytest.approx(reference(len(TOKENS) - 1)["eval_loss"], rel=RTOL)


def test_a_hopeless_model_has_a_finite_perplexity():
    model, params = model_and_params()
    worse = params | {"head": jax.tree.map(lambda x: 1e5 * x, params["head"])}
    config = make_config()
    one = jax.devices()[:1]
    step = train_step.pmap_eval_step(config, train_step.make_eval_step(config, model, one), one)
    scores = evaluate(step, worse, eval_batches(corpus_of(TOKENS), config, ROWS, share=Share(1)), None)
    assert scores["eval_loss"] > 1000 and math.isfinite(scores["eval_perplexity"])
