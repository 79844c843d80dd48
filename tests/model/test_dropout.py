"""Dropout has a mask for each sequence, embedding and branch, which does not depend on how a batch is split."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.model import layers, make_model
from jaxlm.model.tensor import ALONE
from tests.decoders import MAX_LEN, TINY, VOCAB, drawn, some_tokens, with_


def test_dropout_of_ones_keeps_the_mean() -> None:
    """Each element becomes 0 with probability `rate`, otherwise 1 / (1 - rate), so the mean stays 1."""
    rate, n = 0.3, 40_000
    keys_B = jax.random.split(jax.random.key(0), 2)
    x_ND = jnp.ones((2 * n // 8, 8))
    out = np.asarray(layers.dropout(x_ND, rate, keys_B, 3, ALONE))
    assert set(np.unique(out)) == {0.0, np.float32(1 / (1 - rate))}
    deviation = math.sqrt(rate / (1 - rate) / out.size)
    assert abs(out.mean() - 1) < 5 * deviation
    rows = (out.reshape(2, -1), np.asarray(layers.dropout(x_ND, rate, keys_B, 4, ALONE)).reshape(2, -1))
    for a, b in [(rows[0][0], rows[0][1]), (rows[0][0], rows[1][0])]:  # sequences and sites have different masks
        assert abs(np.mean((a == 0) & (b == 0)) - rate**2) < 0.02
    np.testing.assert_array_equal(layers.dropout(x_ND, rate, None, 3, ALONE), x_ND)
    np.testing.assert_array_equal(layers.dropout(x_ND, 0.0, keys_B, 3, ALONE), x_ND)


def test_dropout_is_a_function_of_the_sequences_key() -> None:
    model = make_model(with_(dropout=0.4), VOCAB, MAX_LEN)
    params, tokens_BT = drawn(model), some_tokens(4, 6)
    keys_B = jax.random.split(jax.random.key(5), 4)
    hidden = jax.jit(model.hidden)
    plain = hidden(params, tokens_BT)
    without = jax.jit(make_model(TINY, VOCAB, MAX_LEN).hidden)(params, tokens_BT, keys_B)
    np.testing.assert_allclose(plain, without, rtol=0, atol=1e-5)
    masked = hidden(params, tokens_BT, keys_B)
    assert np.abs(masked - plain).max() > 0.1
    np.testing.assert_array_equal(masked, hidden(params, tokens_BT, keys_B))
    assert np.abs(masked - hidden(params, tokens_BT, keys_B[::-1])).max() > 0.1
    parts = [hidden(params, tokens_BT[i : i + 2], keys_B[i : i + 2]) for i in (0, 2)]
    np.testing.assert_allclose(np.concatenate(parts), masked, rtol=0, atol=1e-5)


def test_the_embedding_and_each_branch_have_different_masks() -> None:
    """If one branch or the embedding adds a large constant, the signs of the final states show its mask."""
    c, n = with_(num_layers=2, d_model=512, d_ff=8, dropout=0.5, use_bias=True, position="sinusoidal"), 4
    model = make_model(c, VOCAB, MAX_LEN)
    zeros = jax.tree.map(lambda x: np.zeros(x.shape, np.float32), model.shapes())
    zeros["final_norm"]["scale"] += 1
    masks, hidden = [], jax.jit(model.hidden)
    for layer, (part, name) in itertools.product(range(2), (("attention", "out"), ("mlp", "down"))):
        params = jax.tree.map(np.copy, zeros)
        params["layers"][part][name]["bias"][layer] = 1e6  # so large that the position embeddings do not matter
        x_ND = np.asarray(hidden(params, some_tokens(1, n), jax.random.split(jax.random.key(0), 1)))
        masks.append(x_ND > 0)
    params = jax.tree.map(np.copy, zeros)
    params["embed"]["embedding"] += 1e6
    masks.append(np.asarray(hidden(params, some_tokens(1, n), jax.random.split(jax.random.key(0), 1))) > 0)
    for mask in masks:
        assert 0.4 < mask.mean() < 0.6
    for a, b in itertools.combinations(masks, 2):
        assert 0.4 < (a == b).mean() < 0.6
