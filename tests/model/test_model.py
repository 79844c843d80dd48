"""Compares the decoder with the papers' formulas in NumPy, and checks the properties that a decoder must have.

Shapes as in `jaxlm/model/blocks.py`: B batch, T time, N = B * T, D d_model, H heads, K key/value heads, C head size.
"""

import dataclasses
import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.config import ModelConfig
from jaxlm.model import Model, Params, flops_per_token, make_model, num_params
from jaxlm.model.remat import WIDE, layer_loop
from tests import reference
from tests.decoders import MAX_LEN, TINY, VOCAB, drawn, logits_of, some_tokens, with_


def mean_loss(model: Model, params: Params, tokens_BT: Any) -> tuple[jax.Array, jax.Array]:
    logits_BTV = logits_of(model)(params, tokens_BT[:, :-1])
    gold = jnp.take_along_axis(jax.nn.log_softmax(logits_BTV), tokens_BT[:, 1:, None], axis=-1)
    return -gold.mean(), logits_BTV


# Every activation with every position, each with a pattern of switches. Any two switches occur in all combinations.
SWITCHES = ("norm", "kv", "qk_norm", "use_bias", "tie_embeddings", "softcap", "key_offset")
PATTERNS = [
    "".join(str(bit) for bit in (a, b, a ^ b, c, a ^ c, b ^ c, a ^ b ^ c))
    for a, b, c in itertools.product((0, 1), repeat=3)
]
GRID = [
    (activation, position, PATTERNS[i % 8])
    for i, (activation, position) in enumerate(
        itertools.product(("gelu", "relu", "swiglu", "geglu", "relu2"), ("rope", "learned", "sinusoidal"))
    )
]


def grid_config(activation: str, position: str, pattern: str) -> ModelConfig:
    on = {name: bit == "1" for name, bit in zip(SWITCHES, pattern, strict=True)}
    return with_(
        activation=activation,
        position=position,
        norm="rmsnorm" if on["norm"] else "layernorm",
        num_kv_heads=2 if on["kv"] else 0,
        qk_norm=on["qk_norm"],
        key_offset=on["key_offset"],
        use_bias=on["use_bias"],
        tie_embeddings=on["tie_embeddings"],
        logit_softcap=2.0 if on["softcap"] else 0.0,
    )


def test_the_grid_has_every_pair_of_switches() -> None:
    for i, j in itertools.combinations(range(len(SWITCHES)), 2):
        assert {(p[i], p[j]) for p in PATTERNS} == set(itertools.product("01", repeat=2)), (SWITCHES[i], SWITCHES[j])
    assert {row[2] for row in GRID} == set(PATTERNS)


@pytest.mark.parametrize("row", GRID, ids="-".join)
def test_logits_are_those_of_the_formulas(row: tuple[str, str, str]) -> None:
    c = grid_config(*row)
    model = make_model(c, VOCAB, MAX_LEN)
    params, tokens_BT = drawn(model), some_tokens(2, MAX_LEN)
    expected = np.stack([reference.logits(c, params, tokens_T) for tokens_T in tokens_BT])
    logits_BTV = jax.jit(logits_of(model))(params, tokens_BT)
    assert logits_BTV.shape == (2, MAX_LEN, VOCAB) and logits_BTV.dtype == jnp.float32
    assert expected.std() > 0.3
    np.testing.assert_allclose(logits_BTV, expected, rtol=0, atol=2e-5 * np.abs(expected).max())


@pytest.mark.parametrize("row", [GRID[i] for i in (0, 4, 8, 9, 13)], ids="-".join)
def test_gradients_are_those_of_finite_differences(row: tuple[str, str, str]) -> None:
    """Along a random direction in each parameter, gradients equal differences of the float64 reference's loss."""
    c = grid_config(*row)
    model = make_model(c, VOCAB, MAX_LEN)
    params, tokens_BT = drawn(model), some_tokens(2, 7)
    grads, _ = jax.jit(jax.grad(lambda p: mean_loss(model, p, tokens_BT), has_aux=True))(params)
    rng = np.random.default_rng(2)
    leaves, tree = jax.tree.flatten(params)
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    scale = max(np.abs(g).max() for g in jax.tree.leaves(grads))
    for i, grad in enumerate(jax.tree.leaves(grads)):
        direction = rng.standard_normal(leaves[i].shape)
        direction /= np.linalg.norm(direction)

        def moved(h: float, i: int = i, direction: np.ndarray = direction) -> float:
            leaf = leaves[i].astype(np.float64) + h * direction
            return reference.mean_nll(c, jax.tree.unflatten(tree, [*leaves[:i], leaf, *leaves[i + 1 :]]), tokens_BT)

        expected = (moved(1e-5) - moved(-1e-5)) / 2e-5
        assert abs(np.vdot(np.asarray(grad, np.float64), direction) - expected) < 2e-5 * scale, paths[i]


# Causality


@pytest.mark.parametrize("position", ["rope", "learned"])
def test_a_token_changes_nothing_before_it(position: str) -> None:
    T = 256  # four chunks of queries
    c = with_(position=position, num_kv_heads=2)
    model = make_model(c, VOCAB, T)
    params, tokens_BT = drawn(model), some_tokens(1, T)
    apply = jax.jit(logits_of(model))
    before = np.asarray(apply(params, tokens_BT))
    for t in (1, 64, 65, 127, 200, 255):
        changed = tokens_BT.copy()
        changed[0, t] = (changed[0, t] + 1) % VOCAB
        after = np.asarray(apply(params, changed))
        np.testing.assert_array_equal(after[:, :t], before[:, :t])
        assert (np.abs(after[:, t:] - before[:, t:]).max(-1) > 1e-7).mean() > 0.95  # and later positions see it
        assert np.abs(after[:, t] - before[:, t]).max() > 1e-2


# Settings that change speed and memory only


def test_unrolling_and_rematerialization_do_not_change_results() -> None:
    tokens_BT = some_tokens(2, 9)
    base = with_(num_layers=3, position="sinusoidal", norm="rmsnorm", activation="relu2")
    settings = [(1, "none"), (0, "none"), (2, "none"), (1, "dots"), (0, "full"), (1, "elementwise")]
    products, texts, results = {}, {}, {}
    for unroll, remat in settings:
        model = make_model(dataclasses.replace(base, scan_unroll=unroll, remat=remat), VOCAB, MAX_LEN)
        params = drawn(model)
        grad = jax.jit(jax.value_and_grad(lambda p, m=model: mean_loss(m, p, tokens_BT)[0]))
        traced = grad.trace(params)
        products[unroll, remat] = str(traced.jaxpr).count("dot_general")
        lowered = traced.lower()
        texts[unroll, remat] = lowered.as_text()
        results[unroll, remat] = lowered.compile()(params)
    # The settings do differ: rematerialization adds products, and no loop is left when all layers are unrolled.
    assert products[1, "none"] < products[1, "dots"]
    assert products[0, "none"] < products[0, "full"]
    assert products[1, "none"] < products[1, "elementwise"] <= products[1, "dots"]  # scores of attention
    assert "stablehlo.while" in texts[1, "none"] and "stablehlo.while" not in texts[0, "none"]
    assert texts[2, "none"] not in (texts[0, "none"], texts[1, "none"])
    loss, grads = results[1, "none"]
    scale = max(np.abs(g).max() for g in jax.tree.leaves(grads))
    for setting in settings[1:]:
        other_loss, other_grads = results[setting]
        np.testing.assert_allclose(other_loss, loss, rtol=2e-6)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * scale), other_grads, grads)


def test_automatic_settings_follow_the_platform() -> None:
    c = with_(num_layers=3, scan_unroll=-1, remat="auto")
    assert layer_loop(c, "cpu") == (3, "none") and layer_loop(c, "gpu") == (1, "elementwise")
    wide = dataclasses.replace(c, d_model=WIDE)
    assert layer_loop(wide, "cpu") == layer_loop(wide, "gpu") == (1, "elementwise")
    assert layer_loop(dataclasses.replace(c, remat="full"), "cpu") == (1, "full")  # unrolled, it would save nothing
    chosen = dataclasses.replace(c, scan_unroll=0, remat="full")
    assert layer_loop(chosen, "cpu") == layer_loop(chosen, "gpu") == (3, "full")
    model = make_model(c, VOCAB, MAX_LEN)
    texts = [
        str(jax.make_jaxpr(m.hidden)(drawn(model), some_tokens(1, 8))) for m in (model, model.having(platform="gpu"))
    ]
    assert texts[0] != texts[1] == str(jax.make_jaxpr(make_model(c, VOCAB, MAX_LEN, "gpu").hidden)(
        drawn(model), some_tokens(1, 8)))  # fmt: skip


def test_bfloat16_keeps_parameters_and_logits_in_float32() -> None:
    c = with_(qk_norm=True, use_bias=True, activation="swiglu")
    half = make_model(dataclasses.replace(c, dtype="bfloat16"), VOCAB, MAX_LEN)
    full = make_model(c, VOCAB, MAX_LEN)
    params, tokens_BT = drawn(half), some_tokens(2, MAX_LEN)
    shapes = jax.eval_shape(half.init, jax.random.key(0))
    assert shapes == jax.eval_shape(full.init, jax.random.key(0))
    assert {x.dtype for x in jax.tree.leaves(shapes)} == {jnp.dtype("float32")}
    logits = jax.jit(logits_of(half))(params, tokens_BT)
    grads, _ = jax.eval_shape(jax.grad(lambda p: mean_loss(half, p, tokens_BT), has_aux=True), params)
    x_ND = jax.eval_shape(half.hidden, params, tokens_BT)
    assert (x_ND.dtype, logits.dtype) == (jnp.bfloat16, jnp.float32)
    assert {x.dtype for x in jax.tree.leaves(grads)} == {jnp.dtype("float32")}
    exact = np.asarray(jax.jit(logits_of(full))(params, tokens_BT))
    error = np.sqrt(np.mean((logits - exact) ** 2)) / exact.std()
    assert 1e-4 < error < 8 * 2.0**-8  # a rounding is at most 2^-8 relative; a few dozen of them add up at random
    assert half.init_cache(1, 4).k.dtype == jnp.bfloat16


def test_bfloat16_gradients_are_close_to_float32() -> None:
    """The gradients of all parameters are close, also of the embedding of a token that occurs a thousand times, because
    sums of many gradients are kept in float32.
    """
    c = with_(qk_norm=True, norm="rmsnorm")
    rng = np.random.default_rng(0)
    tokens_BT = np.where(rng.random((128, MAX_LEN + 1)) < 0.8, 3, rng.integers(0, VOCAB, (128, MAX_LEN + 1)))
    for tied in (False, True):
        full, half = (
            make_model(dataclasses.replace(c, tie_embeddings=tied, dtype=d), VOCAB, MAX_LEN)
            for d in ("float32", "bfloat16")
        )
        params = drawn(full)

        def grads(model: Model, params: Params = params) -> Any:
            grad = jax.grad(lambda p: mean_loss(model, p, tokens_BT)[0])
            return jax.jit(grad, compiler_options={"xla_allow_excess_precision": False})(params)

        error = jax.tree.map(lambda a, b: np.linalg.norm(a - b) / np.linalg.norm(b), grads(half), grads(full))
        # The error is a few dozen independent roundings of 2^-8; additions that are lost would make it about a half.
        assert max(jax.tree.leaves(error)) < 0.05, error


@pytest.mark.parametrize("tied", [False, True])
def test_bfloat16_logits_are_not_rounded(tied: bool) -> None:
    c = with_(dtype="bfloat16", tie_embeddings=tied, logit_softcap=5.0)
    model = make_model(c, VOCAB, MAX_LEN)
    params = drawn(model)
    w_DV = params["embed"]["embedding"].T if tied else params["head"]["kernel"]
    x_ND = jnp.asarray(np.random.default_rng(0).standard_normal((50, c.d_model)), jnp.bfloat16)
    unembed = jax.jit(model.unembed, compiler_options={"xla_allow_excess_precision": False})
    exact = np.asarray(x_ND, np.float64) @ np.asarray(jnp.asarray(w_DV, jnp.bfloat16), np.float64)
    np.testing.assert_allclose(unembed(params, x_ND), 5 * np.tanh(exact / 5), rtol=0, atol=5e-6)


# Parameters


def test_initial_weights_have_the_right_deviations() -> None:
    c = with_(num_layers=4, d_model=128, num_heads=4, num_kv_heads=2, d_ff=256, use_bias=True, activation="swiglu",
              position="learned", qk_norm=True)  # fmt: skip
    params = jax.jit(make_model(c, 300, 100).init)(jax.random.key(0))
    leaves = jax.tree_util.tree_leaves_with_path(params)
    flat = {jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(x) for path, x in leaves}
    residual = 1 / math.sqrt(2 * 4)
    deviations = {
        "embed/embedding": ((300, 128), 1.0),
        "positions/embedding": ((100, 128), 1.0),
        "layers/attention/query/kernel": ((4, 128, 128), 128**-0.5),
        "layers/attention/key/kernel": ((4, 128, 64), 128**-0.5),
        "layers/attention/value/kernel": ((4, 128, 64), 128**-0.5),
        "layers/attention/out/kernel": ((4, 128, 128), 128**-0.5 * residual),
        "layers/mlp/up/kernel": ((4, 128, 256), 128**-0.5),
        "layers/mlp/gate/kernel": ((4, 128, 256), 128**-0.5),
        "layers/mlp/down/kernel": ((4, 256, 128), 256**-0.5 * residual),
    }
    for name, (shape, deviation) in deviations.items():
        x = flat.pop(name)
        assert x.shape == shape, name
        for part in x if name.startswith("layers") else [x]:
            assert abs(part.std() / deviation - 1) < 5 / math.sqrt(2 * part.size), name  # 5 of its standard errors
            assert abs(part.mean()) < 5 * deviation / math.sqrt(part.size), name
        if name.startswith("layers"):
            assert abs(np.corrcoef(x[0].ravel(), x[1].ravel())[0, 1]) < 0.05  # layers differ
    assert flat["head/kernel"].shape == (128, 300)  # it is zero, and so are the biases: checked below
    for name, x in flat.items():
        assert x.shape[: name.startswith("layers")] == (4,) * name.startswith("layers"), name
        np.testing.assert_array_equal(x, 1.0 if name.endswith("scale") else 0.0, err_msg=name)
    scales = {name for name in flat if name.endswith("scale")}
    assert scales == {
        "final_norm/scale",
        *(f"layers/{n}/scale" for n in ("attention_norm", "mlp_norm", "attention/query_norm", "attention/key_norm")),
    }
    assert len(flat) - len(scales) == 7 + 3 + 1  # biases of seven linear layers and three layernorms, and the head
    zero = jax.jit(make_model(with_(residual_init="zero"), 300, 100).init)(jax.random.key(0))["layers"]
    assert not np.any(zero["attention"]["out"]["kernel"]) and not np.any(zero["mlp"]["down"]["kernel"])
    assert np.any(zero["attention"]["value"]["kernel"]) and np.any(zero["mlp"]["up"]["kernel"])
    tied = jax.jit(make_model(with_(tie_embeddings=True, d_model=128), 300, 100).init)(jax.random.key(0))
    assert abs(np.asarray(tied["embed"]["embedding"]).std() / 0.02 - 1) < 5 / math.sqrt(2 * 300 * 128)


def test_switches_that_are_off_add_no_parameters() -> None:
    plain = drawn(make_model(TINY, VOCAB, MAX_LEN))
    assert set(plain) == {"embed", "layers", "final_norm", "head"}
    assert set(drawn(make_model(with_(tie_embeddings=True), VOCAB, MAX_LEN))) == {"embed", "layers", "final_norm"}
    leaves = jax.tree_util.tree_leaves_with_path(plain)
    names = {jax.tree_util.keystr(path[-1:], simple=True) for path, _ in leaves}
    assert names == {"embedding", "kernel", "scale"}  # no bias anywhere


@pytest.mark.parametrize("tied", [False, True])
def test_flops_per_token_equal_a_count_by_hand(tied: bool) -> None:
    c = with_(d_model=8, num_heads=2, num_kv_heads=1, d_ff=12, activation="swiglu", norm="rmsnorm", position="learned",
              tie_embeddings=tied)  # fmt: skip
    params = drawn(make_model(c, 10, 6))
    attention = 8 * 8 + 2 * 8 * 4 + 8 * 8  # query, key and value, out
    layer = attention + 3 * 8 * 12 + 2 * 8  # up, gate, down; two norms
    multiplied = 2 * layer + 8 + 10 * 8  # final norm, output layer; tables of look-ups do not count
    assert num_params(params) == multiplied + 6 * 8 + (0 if tied else 10 * 8)
    assert flops_per_token(c, params, seq_len=5) == 6 * multiplied + 12 * 2 * 8 * 5
