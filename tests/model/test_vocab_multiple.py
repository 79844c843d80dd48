"""Embedding tables with more rows than tokens change nothing but the shape."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.base import get_config
from jaxlm.model import make_model
from jaxlm.model.generate import generate
from jaxlm.model.losses import output_loss
from jaxlm.run.open_run import open_run
from tests.decoders import logits_of
from tests.runs import run

V, ROWS = 23, 32


@pytest.mark.parametrize("tied", [False, True])
def test_a_model_with_a_larger_table_computes_the_same(tied: bool):
    small = dataclasses.replace(
        get_config().model, num_layers=1, d_model=16, num_heads=2, tie_embeddings=tied, scan_unroll=1
    )
    padded, plain = make_model(dataclasses.replace(small, vocab_multiple=16), V, 8), make_model(small, V, 8)
    fresh = jax.eval_shape(padded.init, jax.random.key(0))
    rng = np.random.default_rng(0)
    params: Any = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), jnp.float32), fresh)
    assert params["embed"]["embedding"].shape == (ROWS, 16) and (tied or params["head"]["kernel"].shape == (16, ROWS))
    cut = params | {"embed": {"embedding": params["embed"]["embedding"][:V]}}
    if not tied:
        cut |= {"head": {"kernel": params["head"]["kernel"][:, :V]}}
    x, y = rng.integers(0, V, (2, 4, 8))
    config = dataclasses.replace(get_config().loss, label_smoothing=0.1, z_loss=0.01)

    def loss(model: Any, params: Any) -> jax.Array:
        assert logits_of(model)(params, x).shape == (4, 8, V)
        weights, x_ND = model.output_params(params), model.hidden(params, x)
        return output_loss(model.unembed, weights, x_ND, y.ravel(), config).objective

    (a, grads), (b, wanted) = (
        jax.jit(jax.value_and_grad(lambda p, m=m: loss(m, p)))(p) for m, p in ((padded, params), (plain, cut))
    )
    assert float(a) == pytest.approx(float(b), rel=1e-5)
    table = np.asarray(grads["embed"]["embedding"])
    np.testing.assert_allclose(table[:V], wanted["embed"]["embedding"], rtol=1e-4, atol=1e-4)
    assert not table[V:].any() and (tied or not np.asarray(grads["head"]["kernel"])[:, V:].any())
    tokens = generate(padded, params, jnp.zeros((8, 1), jnp.int32), jax.random.key(0), max_new_tokens=64, temperature=9)
    assert int(tokens.max()) == V - 1


def test_a_run_with_a_larger_table_keeps_its_number_of_tokens(tmp_path: Path):
    """A run on bytes has 257 tokens, including bos, and not the 320 rows of its table."""
    (tmp_path / "text").write_text("the quick brown fox jumps over the lazy dog\n" * 40)
    keys = {"data.source": "text", "data.path": tmp_path / "text", "data.tokenizer": "bytes", "steps": 1,
            "model.vocab_multiple": 64, "eval.batches": 1, "eval.sample_tokens": 0}  # fmt: skip
    assert run(tmp_path / "run", **keys) == 0
    opened = open_run(tmp_path / "run", None)
    assert opened.vocab_size == 257 and opened.params["embed"]["embedding"].shape[0] == 320
