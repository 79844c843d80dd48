"""Compares encoder and decoder with NumPy, packed pairs with each pair alone, and decoding with training's pass."""

from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.core import Tracer

from jaxlm.model import Model, Params, attention_flops, blocks, flops_per_token, make_model, network, num_params
from jaxlm.model.context import WHOLE
from jaxlm.model.cross_attention import Encoded, Prompts
from jaxlm.model.generate import BLOCK, generate
from jaxlm.model.tensor import ALONE
from tests import reference
from tests.decoders import MAX_LEN, VOCAB, drawn, some_tokens, with_

S = 10  # tokens of the encoder's rows
ENCODER: dict[str, Any] = {"encoder_layers": 3, "encoder_len": S}
RTOL, ATOL = 2e-4, 2e-4  # float32, beside float64, for logits of order 1

MODELS = {
    "plain": with_(**ENCODER),
    "vaswani": with_(**ENCODER, position="sinusoidal", use_bias=True, tie_embeddings=True, scale_embeddings=True),
    "learned": with_(**ENCODER, position="learned", activation="swiglu", num_kv_heads=2, norm="rmsnorm"),
    "recipe": with_(**ENCODER, norm="rmsnorm", activation="relu2", qk_norm=True, key_offset=True),
    "dropout": with_(**ENCODER, dropout=0.4),
    "lora": with_(**ENCODER, dropout=0.1, lora_rank=2, lora_dropout=0.1, lora_targets=".*"),
    "others": with_(
        **ENCODER, post_norms=True, qkv_bias=True, head_dim=8, num_kv_heads=1, attention_softcap=2.0, rope_fraction=0.5
    ),
}


@cache
def made(name: str, max_len: int = MAX_LEN) -> tuple[Model, Params]:
    model = make_model(MODELS[name], VOCAB, max_len)
    return model, drawn(model)


@partial(jax.jit, static_argnames="model")
def logits_of(model: Model, params: Params, answers: Any, prompts: Prompts, positions: Any = None) -> jax.Array:
    x_ND = model.hidden(params, answers, None, positions, prompts)
    return model.unembed(params, x_ND).reshape(*answers.shape, -1)


@pytest.mark.parametrize("name", [name for name in MODELS if name not in ("dropout", "lora")])
def test_logits_equal_those_of_numpy(name: str):
    c = MODELS[name]
    model, params = made(name)
    answers, prompts = some_tokens(2, MAX_LEN), some_tokens(2, S, seed=2)
    got = logits_of(model, params, answers, Prompts(jnp.asarray(prompts), None))
    want = [reference.logits(c, params, a, prompt_S=p) for a, p in zip(answers, prompts, strict=True)]
    np.testing.assert_allclose(got, want, rtol=RTOL, atol=ATOL)
    other = logits_of(model, params, answers, Prompts(jnp.asarray(prompts[::-1]), None))
    assert np.abs(other - got).max(axis=(0, 2)).min() > 0.01  # every token sees its prompt


def test_an_answer_sees_all_of_its_prompt_and_none_of_its_own_future():
    model, params = made("recipe")
    answers, prompts = some_tokens(1, MAX_LEN), some_tokens(1, S, seed=2)

    def first_logits(answers: np.ndarray, prompts: np.ndarray) -> np.ndarray:
        return logits_of(model, params, answers, Prompts(jnp.asarray(prompts), None))[0, 0]

    got = first_logits(answers, prompts)
    for i in range(S):
        changed = prompts.copy()
        changed[0, i] = (changed[0, i] + 1) % VOCAB
        assert np.abs(first_logits(answers, changed) - got).max() > 1e-3
    later = answers.copy()
    later[0, 1:] = (later[0, 1:] + 1) % VOCAB
    np.testing.assert_array_equal(first_logits(later, prompts), got)


def packed(parts: list[np.ndarray], length: int) -> tuple[np.ndarray, np.ndarray]:
    """A row with its positions; padding has position 0."""
    row, positions = np.zeros((2, 1, length), np.int32)
    both = np.concatenate(parts), np.concatenate([np.arange(len(part)) for part in parts])
    row[0, : len(both[0])], positions[0, : len(both[0])] = both
    return row, positions


LENGTHS = [((3, 4), (5, 2)), ((6, 4), (5, 7)), ((2, 1, 1), (9, 1, 2))]  # of prompts, of answers
ROWS = [(name, *lengths) for name in ("plain", "vaswani", "learned", "recipe") for lengths in LENGTHS]


@pytest.mark.parametrize(
    "name, prompt_lengths, answer_lengths",
    [pytest.param(*row, marks=[pytest.mark.ci] * (i not in (0, 4, 8, 9, 11))) for i, row in enumerate(ROWS)],
)
def test_packed_pairs_are_as_if_alone(name: str, prompt_lengths: tuple[int, ...], answer_lengths: tuple[int, ...]):
    """Also where more padding follows the answers than the prompts; no NaN comes from it, nor from its gradient."""
    model, params = made(name)
    prompts = [some_tokens(n, seed=n) for n in prompt_lengths]
    answers = [some_tokens(n, seed=9 + n) for n in answer_lengths]
    (prompt, prompt_positions), (answer, positions) = packed(prompts, S), packed(answers, MAX_LEN)
    whole = Prompts(jnp.asarray(prompt), jnp.asarray(prompt_positions))
    got = logits_of(model, params, answer, whole, jnp.asarray(positions))[0]
    at = 0
    for prompt, answer_ in zip(prompts, answers, strict=True):
        alone = logits_of(model, params, answer_[None], Prompts(jnp.asarray(prompt[None]), None))[0]
        np.testing.assert_allclose(got[at : at + len(answer_)], alone, rtol=1e-4, atol=1e-5)
        at += len(answer_)

    def loss(params: Params) -> jax.Array:
        x_ND = model.hidden(params, jnp.asarray(answer), None, jnp.asarray(positions), whole)
        return jnp.sum(jnp.square(x_ND[:at]))

    assert all(np.isfinite(g).all() for g in jax.tree.leaves(jax.jit(jax.grad(loss))(params)))


@pytest.mark.parametrize("name", ["vaswani", "recipe", "learned"])
def test_decoded_logits_equal_those_of_training(name: str):
    """In steps, with prompts of different lengths in one batch: the cache keeps which of its tokens are padding."""
    model, params = made(name)
    answers, prompts = some_tokens(2, 6), [some_tokens(4, seed=4), some_tokens(7, seed=7)]
    rows = [packed([prompt], S) for prompt in prompts]
    both = Prompts(*(jnp.concatenate([jnp.asarray(row[i]) for row in rows]) for i in range(2)))
    want = np.stack(
        [
            logits_of(model, params, answers[i : i + 1], Prompts(jnp.asarray(prompts[i][None]), None))[0]
            for i in range(2)
        ]
    )
    cache, got = model.init_cache(2, 6, S), []
    for start, stop in ((0, 1), (1, 4), (4, 5), (5, 6)):
        given = both if start == 0 else None
        logits, cache = jax.jit(model.decode)(params, answers[:, start:stop], cache, jnp.int32(start), given)
        got.append(logits)
    np.testing.assert_allclose(np.concatenate(got, axis=1), want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name, begun", [("recipe", 1), ("recipe", 4), ("learned", 1)])
def test_generated_tokens_are_the_most_probable_ones(name: str, begun: int):
    """Also after a given beginning of the answer, and beyond the last of the learned positions."""
    new = BLOCK + 3
    model, params = made(name, MAX_LEN if name == "learned" else begun + new)
    prompt, answer = some_tokens(1, 5, seed=3), some_tokens(1, begun)
    got = generate(
        model,
        params,
        answer,
        jax.random.key(0),
        max_new_tokens=new,
        temperature=0,
        prompts=Prompts.repeated(prompt[0], 1),
    )
    text = answer
    for _ in range(new):
        seen = text[:, -MAX_LEN:] if model.max_positions else text
        probable = reference.logits(MODELS[name], params, seen[0], prompt_S=prompt[0])[-1].argmax()
        text = np.append(text, [[probable]], axis=1).astype(np.int32)
    np.testing.assert_array_equal(got[0], text[0, begun:])


def test_no_mask_of_dropout_is_used_twice(monkeypatch: pytest.MonkeyPatch):
    """In encoder and decoder, behind each of their parts, and before each matrix of LoRA."""
    model, params = made("lora")
    c, used, keys = MODELS["lora"], list[tuple[bytes, int]](), list[jax.Array]()

    def record(x: jax.Array, rate: float, keys_B: jax.Array, site: Any, *_: Any, **__: Any) -> jax.Array:
        if not any(isinstance(value, Tracer) for value in (keys_B, site)):
            used.append((np.asarray(jax.random.key_data(keys_B)).tobytes(), int(site)))
            keys.append(keys_B)
        return x

    monkeypatch.setattr(blocks, "dropout", record)
    monkeypatch.setattr(network, "dropout", record)
    prompts = Prompts(jnp.asarray(some_tokens(2, S)), None)
    model.hidden(params, some_tokens(2, MAX_LEN), jax.random.split(jax.random.key(0), 2), None, prompts)
    assert len(used) == 2  # embeddings; the layers are in a scan, whose keys and sites are no numbers
    x_ND = jnp.zeros((2 * S, c.d_model))
    encoded = Encoded(x_ND, jnp.ones((2, S), jnp.int32), None)
    for stack, own, keys_B in (("encoder", c.encoder, keys[0]), ("layers", c, keys[1])):
        shared = blocks.LayerInputs(keys_B, None, None, None, None, None, encoded, (2, S), "xla", ALONE, WHOLE)
        for i in range(own.num_layers):
            layer = jax.tree.map(lambda x, i=i: x[i], params[stack])
            blocks.Block(own, S, stack == "layers").apply({"params": layer}, x_ND, jnp.int32(i), None, shared)
    of_decoder = 1 + c.num_layers * (3 + 4 + 4 + 2)  # embeddings; attention, cross-attention, MLP; their matrices
    assert len(used) == of_decoder + 1 + c.encoder_layers * (2 + 4 + 2)
    assert len(set(used)) == len(used)


def test_dropout_belongs_to_sequences():
    """Each has its own masks, whatever else is in the batch."""
    model, params = made("dropout")
    answers, prompts = some_tokens(2, MAX_LEN), some_tokens(2, S, seed=2)
    keys, hidden_of = jax.random.split(jax.random.key(3), 2), jax.jit(model.hidden)

    def hidden(rows: slice, keys: jax.Array | None) -> np.ndarray:
        return np.asarray(hidden_of(params, answers[rows], keys, None, Prompts(jnp.asarray(prompts[rows]), None)))

    both = hidden(slice(0, 2), keys).reshape(2, MAX_LEN, -1)
    np.testing.assert_allclose(hidden(slice(1, 2), keys[1:]), both[1], rtol=1e-5, atol=1e-5)
    assert np.abs(hidden(slice(0, 2), None).reshape(both.shape) - both).max() > 0.1


def test_flops_count_the_encoder_for_its_own_tokens():
    c = with_(**ENCODER, position="learned")
    model, T = make_model(c, VOCAB, MAX_LEN), 5
    params = model.shapes()
    D, F, L, E = c.d_model, c.d_ff, c.num_layers, c.encoder_layers
    assert num_params(params["encoder"]) == E * (4 * D * D + 2 * D * F + 2 * D)
    of_answer = L * (6 * D * D + 2 * D * F + 3 * D) + D + VOCAB * D
    of_prompt = E * (4 * D * D + 2 * D * F + 2 * D) + D + L * 2 * D * D
    attention = 12 * D * (L * T * T + L * T * S + E * S * S)  # of a sequence
    assert attention_flops(c, T) * T == pytest.approx(attention)
    assert flops_per_token(c, params, T) * T == pytest.approx(6 * (of_answer * T + of_prompt * S) + attention)


def test_layers_that_add_to_the_residual_stream_start_by_their_number():
    """GPT-2's rule: 1 / sqrt(n) for n of them: three for each layer of the decoder, two for each of the encoder."""
    c = with_(num_layers=2, encoder_layers=4, encoder_len=S, d_model=64)
    params = make_model(c, VOCAB, MAX_LEN).init(jax.random.key(0))
    for stack, part, count in (("layers", "attention", 6), ("layers", "cross", 6), ("encoder", "attention", 8)):
        std = params[stack][part]["out"]["kernel"].std()
        assert std == pytest.approx(64**-0.5 * count**-0.5, rel=0.05)
