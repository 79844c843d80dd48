"""Sampling gives the same tokens with and without a cache, and the filters keep the right tokens."""

import dataclasses
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.model import Model, Params, make_model
from jaxlm.model.generate import BLOCK, _read, filter_logits, generate, stream
from tests.decoders import logits_of, with_

VOCAB, MAX_LEN, NEW = 17, 24, 18
TINY = with_(num_kv_heads=2, d_ff=24, activation="swiglu", norm="rmsnorm", dropout=0.5, attention="auto")


def with_params(max_len: int = MAX_LEN, **changes: Any) -> tuple[Model, Params]:
    """Returns a model, and weights that are large enough for varied texts."""
    model = make_model(dataclasses.replace(TINY, **changes), VOCAB, max_len)
    rng = np.random.default_rng(0)
    shapes = model.shapes()
    return model, jax.tree.map(lambda x: np.asarray(0.8 * rng.standard_normal(x.shape), np.float32), shapes)


@pytest.fixture(scope="module")
def rope() -> tuple[Model, Params]:
    return with_params()


def prompts(rows: int, length: int = 4) -> np.ndarray:
    return np.random.default_rng(1).integers(0, VOCAB, (rows, length)).astype(np.int32)


VARIANTS = [("rope", 2), ("learned", 1), ("sinusoidal", 0)]


@pytest.mark.parametrize("position, kv_heads", VARIANTS)
def test_greedy_is_the_uncached_argmax(position: str, kv_heads: int) -> None:
    """Each token has the largest logit of the model on all tokens before it, computed without a cache."""
    model, params = with_params(position=position, num_kv_heads=kv_heads)
    prompt_BT = prompts(3)
    new_BT = generate(model, params, prompt_BT, jax.random.key(0), max_new_tokens=NEW, temperature=0.0)
    assert new_BT.shape == (3, NEW) and new_BT.dtype == jnp.int32
    text_BT = np.concatenate([prompt_BT, new_BT], axis=1)
    # The logits at t see the tokens up to t only, so one pass over the whole text is a pass over each prefix.
    logits_BTV = np.asarray(jax.jit(logits_of(model))(params, text_BT))
    np.testing.assert_array_equal(logits_BTV.argmax(-1)[:, 3:-1], new_BT)
    assert len(np.unique(new_BT)) > 4  # a text of one repeated token would prove nothing
    assert len({tuple(row) for row in np.asarray(new_BT)}) == 3


@pytest.mark.parametrize("length", [7, 8, 9, 13])
def test_a_long_prompt_is_read_in_chunks(
    length: int, rope: tuple[Model, Params], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The chunks have 4 tokens here. The last chunk has 1 to 4 tokens, whose logits give the first new token."""
    model, params = rope
    prompt_BT = prompts(2, length)
    whole = generate(model, params, prompt_BT, jax.random.key(0), max_new_tokens=2, temperature=0.0)
    cast(Any, _read).clear_cache()  # it was compiled with the old size of chunks
    monkeypatch.setattr("jaxlm.model.generate.CHUNK", 4)
    sizes: list[int] = []  # numbers of tokens given to the model, whenever it is traced

    def decode(params: Params, tokens_BT: jax.Array, *rest: Any) -> Any:
        sizes.append(tokens_BT.shape[1])
        return model.decode(params, tokens_BT, *rest)

    told = model._replace(decode=decode)
    chunks = generate(told, params, prompt_BT, jax.random.key(0), max_new_tokens=2, temperature=0.0)
    assert set(sizes) == {4, (length - 1) % 4 + 1, 1}
    np.testing.assert_array_equal(chunks, whole)
    cast(Any, _read).clear_cache()


@pytest.mark.parametrize("length", [6, 9, 10, 16])
def test_longrope_reads_a_long_prompt_as_a_whole(length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its first context has 8 tokens. In longer texts, tokens before that place are rotated otherwise, too."""
    model, params = with_params(rope_scaling="longrope", rope_original=8, rope_factor=4.0, rope_fraction=0.5,
                                head_dim=8, rope_short="1.0 1.0", rope_long="40.0 90.0")  # fmt: skip
    prompt_BT = prompts(3, length)
    want = np.asarray(jax.jit(logits_of(model))(params, prompt_BT))[:, -1].argmax(-1)
    cast(Any, _read).clear_cache()
    monkeypatch.setattr("jaxlm.model.generate.CHUNK", 4)
    got = generate(model, params, prompt_BT, jax.random.key(0), max_new_tokens=1, temperature=0.0)
    cast(Any, _read).clear_cache()
    np.testing.assert_array_equal(got[:, 0], want)


@pytest.mark.parametrize("key_offset", [False, True])
def test_cached_logits_equal_uncached_logits(key_offset: bool) -> None:
    """Logits do not depend on how a text is split into calls: a prompt, several tokens at once, one token."""
    model, params = with_params(key_offset=key_offset)
    text_BT = prompts(2, 12)
    expected = jax.jit(logits_of(model))(params, text_BT)
    cache, decode, parts, start = model.init_cache(2, 15), jax.jit(model.decode), [], 0
    for size in (5, 6, 1):
        logits_BTV, cache = decode(params, text_BT[:, start : start + size], cache, start)
        parts.append(logits_BTV)
        start += size
    np.testing.assert_allclose(np.concatenate(parts, axis=1), expected, rtol=0, atol=2e-5 * np.abs(expected).max())


def test_a_row_does_not_depend_on_the_number_of_rows(rope: tuple[Model, Params]) -> None:
    model, params = rope
    prompt_BT = np.repeat(prompts(1), 5, axis=0)
    five = np.asarray(generate(model, params, prompt_BT, jax.random.key(3), max_new_tokens=NEW))
    two = np.asarray(generate(model, params, prompt_BT[:2], jax.random.key(3), max_new_tokens=NEW))
    np.testing.assert_array_equal(five[:2], two)
    assert len({tuple(row) for row in five}) == 5  # and the rows are different texts


def test_the_seed_determines_the_text(rope: tuple[Model, Params]) -> None:
    model, params = rope

    def text(seed: int) -> np.ndarray:
        return np.asarray(generate(model, params, prompts(2), jax.random.key(seed), max_new_tokens=NEW))

    np.testing.assert_array_equal(text(1), text(1))
    assert (text(1) != text(2)).mean() > 0.3


def test_tokens_are_drawn_independently(rope: tuple[Model, Params]) -> None:
    """If all tokens are equally probable, a text is a sequence of independent draws."""
    model, params = rope
    nothing = jax.tree.map(np.zeros_like, params)
    text_BT = np.asarray(generate(model, nothing, prompts(2), jax.random.key(1), max_new_tokens=NEW))
    assert min(len(np.unique(row)) for row in text_BT) > 7  # distinct tokens in 18 draws out of 17


def test_top_k_of_1_is_greedy(rope: tuple[Model, Params]) -> None:
    model, params = rope

    def text(**how: Any) -> np.ndarray:
        return np.asarray(generate(model, params, prompts(2), jax.random.key(4), max_new_tokens=NEW, **how))

    greedy = text(temperature=0.0)
    np.testing.assert_array_equal(text(top_k=1), greedy)
    np.testing.assert_array_equal(text(top_p=1e-6), greedy)
    assert (text(top_k=2) != greedy).any()


@pytest.mark.parametrize("temperature, top_k", [(1.0, 0), (0.5, 0), (2.0, 5)])
def test_token_frequencies_match_probabilities(rope: tuple[Model, Params], temperature: float, top_k: int) -> None:
    model, params = rope
    n = 4000
    prompt_BT = np.repeat(prompts(1), n, axis=0)
    key = jax.random.key(5)
    drawn = generate(model, params, prompt_BT, key, max_new_tokens=1, temperature=temperature, top_k=top_k)
    logits_V = np.asarray(jax.jit(logits_of(model))(params, prompt_BT[:1]))[0, -1].astype(np.float64) / temperature
    if top_k:
        logits_V[np.argsort(logits_V)[:-top_k]] = -np.inf
    probs_V = np.exp(logits_V - logits_V.max()) / np.exp(logits_V - logits_V.max()).sum()
    often_V = np.bincount(np.asarray(drawn)[:, 0], minlength=VOCAB) / n
    assert (np.abs(often_V - probs_V) <= 5 * np.sqrt(probs_V * (1 - probs_V) / n) + 1e-9).all()
    assert ((probs_V > 0.05) & (probs_V < 0.95)).sum() >= 2


# A few tokens at a time


def test_tokens_come_in_blocks_until_stop_is_true(rope: tuple[Model, Params]) -> None:
    model, params = rope
    new = 2 * BLOCK + 5
    how: dict[str, Any] = {"max_new_tokens": new, "top_k": 5}
    whole_BN = generate(model, params, prompts(2), jax.random.key(6), **how)
    assert whole_BN.shape == (2, new) and len(np.unique(whole_BN)) > 4
    blocks = []
    for block_BN in stream(model, params, prompts(2), jax.random.key(6), stop=lambda: len(blocks) == 2, **how):
        blocks.append(block_BN)
    assert [block_BN.shape[1] for block_BN in blocks] == [1, BLOCK]
    np.testing.assert_array_equal(np.concatenate(blocks, axis=1), whole_BN[:, : 1 + BLOCK])


@pytest.mark.parametrize("position, length", [("learned", 4), ("sinusoidal", 4), ("learned", MAX_LEN)])
def test_beyond_max_len_a_text_continues_from_its_last_tokens(position: str, length: int) -> None:
    """As in nanoGPT, each token is drawn from the logits of the last `max_len` tokens alone."""
    model, params = with_params(position=position)
    text_BT, new = prompts(2, length), MAX_LEN + 5
    got_BN = generate(model, params, text_BT, jax.random.key(0), max_new_tokens=new, temperature=0.0)
    apply = jax.jit(logits_of(model))
    for _ in range(new):
        window_BT = text_BT[:, -MAX_LEN:]
        last, rest = window_BT.shape[1] - 1, np.zeros((2, MAX_LEN - window_BT.shape[1]), np.int32)
        logits_BTV = apply(params, np.concatenate([window_BT, rest], axis=1))  # padded; later tokens are not seen
        text_BT = np.concatenate([text_BT, np.asarray(logits_BTV)[:, last].argmax(-1, keepdims=True)], axis=1)
    np.testing.assert_array_equal(got_BN, text_BT[:, length:])
    assert len(np.unique(got_BN[:, -MAX_LEN:])) > 4


# Filters


def reference(logits_V: np.ndarray, temperature: float, top_k: int, top_p: float) -> np.ndarray:
    """Filters one row. Tokens with the same logit as the last token kept are kept as well."""
    out = (logits_V.astype(np.float64) - logits_V.max()) / temperature
    if top_k:
        out[out < np.sort(out)[::-1][top_k - 1]] = -np.inf
    probs = np.exp(out - out.max())
    probs /= probs.sum()
    together, least = 0.0, np.inf
    for i in np.argsort(-out, kind="stable"):
        if together < top_p:
            least = out[i]
        together += probs[i]
    out[out < least] = -np.inf
    return out


HAND_MADE = np.log(
    np.array([[0.4, 0.3, 0.15, 0.1, 0.05], [0.05, 0.1, 0.4, 0.3, 0.15], [0.1, 0.35, 0.35, 0.1, 0.1], [0.2] * 5])
).astype(np.float32)


@pytest.mark.parametrize("temperature", [1.0, 0.5, 3.0])
@pytest.mark.parametrize("top_k", [0, 1, 2, 4])
@pytest.mark.parametrize("top_p", [1.0, 0.01, 0.45, 0.75, 0.97])
def test_filters_equal_the_reference(temperature: float, top_k: int, top_p: float) -> None:
    got = np.asarray(filter_logits(jnp.asarray(HAND_MADE), temperature, top_k, top_p))
    expected = np.stack([reference(row, temperature, top_k, top_p) for row in HAND_MADE])
    np.testing.assert_array_equal(np.isinf(got), np.isinf(expected))
    np.testing.assert_allclose(got, expected, rtol=1e-6, atol=1e-6)  # differences of logits of order 1


def kept(temperature: float, top_k: int, top_p: float) -> list[list[int]]:
    got = np.asarray(filter_logits(jnp.asarray(HAND_MADE), temperature, top_k, top_p))
    return [np.flatnonzero(np.isfinite(row)).tolist() for row in got]


def test_filters_keep_the_tokens_counted_by_hand() -> None:
    """The filters keep these tokens of each row of HAND_MADE."""
    everything = list(range(5))
    assert kept(1.0, 0, 1.0) == [everything] * 4
    assert kept(1.0, 5, 1.0) == kept(1.0, 99, 1.0) == [everything] * 4
    assert kept(1.0, 2, 1.0) == [[0, 1], [2, 3], [1, 2], everything]  # of five equal tokens all are kept
    assert kept(1.0, 3, 1.0) == [[0, 1, 2], [2, 3, 4], everything, everything]
    assert kept(1.0, 0, 0.5) == [[0, 1], [2, 3], [1, 2], everything]
    assert kept(1.0, 0, 0.8) == [[0, 1, 2], [2, 3, 4], everything, everything]
    assert kept(1.0, 0, 0.01) == [[0], [2], [1, 2], everything]  # at least one token is kept
    assert kept(1.0, 2, 0.5) == [[0], [2], [1, 2], everything]  # 0.4 / 0.7 of what top-k keeps
    assert kept(0.0, 1, 1.0) == [[0], [2], [1, 2], everything]
    assert kept(1.0, 0, 1e-46) == [[0], [2], [1, 2], everything]  # top_p is 0 in float32


@pytest.mark.parametrize("temperature", [1e-40, 1e-38, 1e-6])
def test_a_temperature_near_0_keeps_only_the_most_probable_token(temperature: float) -> None:
    """Logits divided by 1e-38 overflow float32."""
    probs = np.asarray(jax.nn.softmax(filter_logits(jnp.asarray(100 * HAND_MADE[:2]), temperature, 0, 1.0)))
    np.testing.assert_array_equal(probs, np.eye(5)[[0, 2]])


# Texts longer than in training


def test_a_token_sees_the_last_max_len_tokens() -> None:
    """With one layer and rotary positions, the logits after a long text are those of its last `max_len` tokens alone.

    With more layers they are not, because the states in the window were computed from tokens before it.
    """
    window, length = 6, 20
    model, params = with_params(window, num_layers=1)
    text_T = prompts(1, length)[0]
    logits_TV, cache = [], model.init_cache(1, length)
    decode, apply = jax.jit(model.decode), jax.jit(logits_of(model))
    for t in range(length):
        logits_BTV, cache = decode(params, text_T[None, t : t + 1], cache, t)
        logits_TV.append(np.asarray(logits_BTV)[0, 0])
    windows = np.stack([text_T[t - window + 1 : t + 1] for t in range(window - 1, length)])
    expected = np.asarray(apply(params, windows))[:, -1]
    np.testing.assert_allclose(np.stack(logits_TV)[window - 1 :], expected, rtol=0, atol=3e-5 * np.abs(expected).max())
    all_of_it = np.asarray(
        logits_of(make_model(dataclasses.replace(TINY, num_layers=1), VOCAB, length))(params, text_T[None])
    )[0]
    assert np.abs(all_of_it[window:] - np.stack(logits_TV)[window:]).max(-1).min() > 1e-2  # the window matters
