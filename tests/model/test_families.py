"""What pretrained models have and the first model did not, one mixture for each family, beside float64 formulas."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.config import ModelConfig
from jaxlm.model import attention_flops, make_model
from jaxlm.model.attention import Scores, choose_kernel, self_attention
from jaxlm.model.rope import rope_tables
from tests import reference
from tests.decoders import MAX_LEN, VOCAB, drawn, logits_of, some_tokens, with_

PLAIN: dict[str, Any] = {"norm": "rmsnorm", "activation": "swiglu", "num_kv_heads": 2}
GEMMA: dict[str, Any] = PLAIN | {
    "activation": "geglu", "head_dim": 6, "post_norms": True, "scale_embeddings": True, "tie_embeddings": True,
    "score_dim": 9, "window": 5, "num_layers": 3,
}  # fmt: skip
FAMILIES: dict[str, ModelConfig] = {
    "mistral": with_(**PLAIN, window=4, norm_eps=1e-2),
    "nemo": with_(**PLAIN, head_dim=10),
    "qwen2": with_(**PLAIN, qkv_bias=True, tie_embeddings=True),
    "qwen3": with_(**PLAIN, qk_norm=True, head_dim=6, norm_eps=1e-2),
    "gemma2": with_(**GEMMA, global_every=2, attention_softcap=1.5, logit_softcap=2.0),
    "gemma3": with_(
        **GEMMA, global_every=3, qk_norm=True, rope_local_theta=7.0, rope_scaling="linear", rope_factor=3.0
    ),
    "phi4": with_(**PLAIN, head_dim=8, rope_fraction=0.75),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_are_those_of_the_formulas(name: str) -> None:
    c = FAMILIES[name]
    model = make_model(c, VOCAB, MAX_LEN)
    params, tokens_BT = drawn(model), some_tokens(2, MAX_LEN)
    expected = np.stack([reference.logits(c, params, tokens_T) for tokens_T in tokens_BT])
    found = jax.jit(logits_of(model))(params, tokens_BT)
    assert expected.std() > 0.3
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-5 * np.abs(expected).max())


@pytest.mark.parametrize("name", ["gemma2", "gemma3"])
def test_cached_and_packed_logits_equal_those_of_whole_rows(name: str) -> None:
    """Windows count inside a document, and in the cache."""
    model = make_model(FAMILIES[name], VOCAB, MAX_LEN)
    params, text_BT = drawn(model), some_tokens(1, MAX_LEN)
    expected = jax.jit(logits_of(model))(params, text_BT)
    close = {"rtol": 0, "atol": 2e-5 * np.abs(expected).max()}
    cache, decode, start = model.init_cache(1, MAX_LEN), jax.jit(model.decode), 0
    for size in (7, MAX_LEN - 8, 1):
        found, cache = decode(params, text_BT[:, start : start + size], cache, start)
        np.testing.assert_allclose(found, expected[:, start : start + size], **close)
        start += size
    first = 5  # tokens of a document before
    packed_BT = np.concatenate([some_tokens(1, first, seed=9), text_BT], axis=1)
    positions_BT = np.concatenate([np.arange(first), np.arange(MAX_LEN)])[None].astype(np.int32)
    x_ND = jax.jit(model.hidden)(params, packed_BT, positions_BT=positions_BT)
    np.testing.assert_allclose(model.unembed(params, x_ND[first:]), expected[0], **close)


def test_the_loop_over_layers_may_be_rolled_or_recomputed() -> None:
    """With layers that differ: the same gradients."""
    tokens_BT = some_tokens(2, MAX_LEN)

    def gradient(**changes: Any) -> Any:
        model = make_model(with_(**GEMMA, global_every=2, **changes), VOCAB, MAX_LEN)
        return jax.jit(jax.grad(lambda p: jnp.square(logits_of(model)(p, tokens_BT)).mean()))(drawn(model))

    want = gradient(scan_unroll=0)
    largest = max(float(np.abs(g).max()) for g in jax.tree.leaves(want))
    for remat in ("none", "elementwise", "full"):
        got = gradient(scan_unroll=1, remat=remat)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * largest), got, want)


@pytest.mark.parametrize("T, window", [(256, 100), (256, 1), (257, 30), (64, 64)])
def test_a_window_is_cut_out_of_the_keys_of_each_chunk(T: int, window: int) -> None:
    rng = np.random.default_rng(0)
    q, k, v = rng.standard_normal((3, 1, T, 1, 8)).astype(np.float32)
    out = jax.jit(lambda q, k, v: self_attention(q, k, v, Scores(8**-0.5, 0.0, window)))(q, k, v)
    expected = reference.attention(*(x[0, :, 0].astype(np.float64) for x in (q, k, v)), window=window)
    np.testing.assert_allclose(out[0, :, 0], expected, rtol=0, atol=3e-6)


def test_llama3_stretches_long_wavelengths_alone() -> None:
    c = with_(head_dim=8, rope_theta=1e4, rope_scaling="llama3", rope_factor=8.0, rope_original=256)
    plain = 1e4 ** (-np.arange(0, 8, 2) / 8)  # wavelengths of 6, 63, 628 and 6283
    weight = (256 * plain[1] / (2 * np.pi) - 1) / 3  # a wavelength that fits 4.07 times is not stretched
    assert weight > 1
    want = plain / [1, 1, 8, 8]
    np.testing.assert_allclose(np.arctan2(*_sin_cos(c, 1)), want, rtol=1e-6)
    between = with_(head_dim=8, rope_theta=1e4, rope_scaling="llama3", rope_factor=8.0, rope_original=126)
    fits = 126 * plain[1] / (2 * np.pi)
    assert 1 < fits < 4
    smooth = (fits - 1) / 3
    np.testing.assert_allclose(
        np.arctan2(*_sin_cos(between, 1))[1], (1 - smooth) * plain[1] / 8 + smooth * plain[1], rtol=1e-6
    )


def test_longrope_has_other_numbers_in_long_texts() -> None:
    c = with_(head_dim=4, rope_theta=100.0, rope_scaling="longrope", rope_factor=4.0, rope_original=16,
              rope_short="1 2", rope_long="3 5")  # fmt: skip
    growth = np.sqrt(1 + np.log(4) / np.log(16))
    for length, factors in ((16, [1, 2]), (17, [3, 5])):
        cos, sin = (np.asarray(t)[1, 0] for t in rope_tables(jnp.arange(length), c))
        angles = np.array([1, 0.1]) / factors
        np.testing.assert_allclose(cos, growth * np.cos([*angles, *angles]), rtol=1e-6)
        np.testing.assert_allclose(sin, growth * np.sin([*-angles, *angles]), rtol=1e-5)


def _sin_cos(c: ModelConfig, position: int) -> tuple[np.ndarray, np.ndarray]:
    cos, sin = (np.asarray(t)[position, 0] for t in rope_tables(jnp.arange(position + 1), c))
    return sin[4:], cos[4:]


def test_fused_kernels_are_left_where_they_cannot_do_it() -> None:
    def chosen(packed: bool, **changes: Any) -> str:
        return choose_kernel(with_(head_dim=64, dtype="bfloat16", attention="auto", **changes), "gpu", packed)

    assert [chosen(False), chosen(True), chosen(False, window=9), chosen(True, window=9)] == [
        "cudnn", "triton", "cudnn", "xla",
    ]  # fmt: skip
    assert chosen(False, attention_softcap=1.0) == "xla"


def test_attention_in_a_window_has_fewer_flops() -> None:
    """Of three layers, the second attends to all 12 tokens; a head has 6 channels, and there are 4."""
    c = with_(head_dim=6, num_layers=3, window=5, global_every=2)
    assert attention_flops(c, 12) == 12 * 4 * 6 * (12 + 2 * 5)
    assert attention_flops(c, 4) == 12 * 4 * 6 * 3 * 4
