"""Samples from a model a few tokens at a time, so that a text can be shown and stopped while it grows.

Shapes: B rows, T tokens of the prompt, V vocabulary, N tokens of a block.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.model import Cache, Model, Params
from jaxlm.model.cross_attention import Prompts

CHUNK = 512  # prompt tokens read at once; attention's memory grows with chunk times context
BLOCK = 16  # tokens drawn in one call: enough to hide its overhead, few enough to show the text as it grows


class Sampling(NamedTuple):
    temperature: float
    top_k: int
    top_p: float


def stream(
    model: Model,
    params: Params,
    prompt_BT: np.ndarray | jax.Array,
    key: jax.Array,
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    prompts: Prompts | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> Iterator[np.ndarray]:
    """Continues each prompt, and yields the new tokens as they are drawn, int32 `[B, n]` with n from 1 to BLOCK.

    Row i depends only on the key and i, not on the number of rows.

    If the model has `max_positions`, a longer text continues from its last `max_positions` tokens alone, and the model
    reads them again for each new token.

    Args:
      prompt_BT: each row has at least one token, and at most `model.max_positions`.
      temperature: 0 takes the most probable token.
      top_k: samples among the k most probable tokens; 0 = all.
      top_p: samples among the most probable tokens that together have this probability (Holtzman et al.).
      prompts: what the encoder reads, if the model has one: one prompt a row. `prompt_BT` then begins the answers.
      stop: called before each block; True ends the text.
    """
    assert prompt_BT.shape[1] <= (model.max_positions or prompt_BT.shape[1])
    how, (B, T) = Sampling(temperature, top_k, top_p), prompt_BT.shape
    params = jax.tree.map(lambda x: x if isinstance(x, jax.Array) else jax.device_put(x), params)
    keys_B = jax.vmap(lambda row: jax.random.fold_in(key, row))(jnp.arange(B))
    length = min(T + max_new_tokens, model.max_positions or T + max_new_tokens)
    first_B, cache = _read(model, params, jnp.asarray(prompt_BT), keys_B, how, length, prompts)
    blocks = [np.asarray(first_B)[:, None]]
    yield blocks[0]

    done = 1  # new tokens; the model has not read the last one yet
    while (count := min(BLOCK, max_new_tokens - done, length - T - done + 1)) > 0 and not stop():
        block_BN, cache = _with_cache(model, params, cache, blocks[-1][:, -1], T + done - 1, done, count, keys_B, how)
        blocks.append(np.asarray(block_BN)[:, :count])
        yield blocks[-1]
        done += count

    text_BT = np.concatenate([prompt_BT, *blocks], axis=1)[:, -length:]
    while (count := min(BLOCK, max_new_tokens - done)) > 0 and not stop():
        block_BN, text_BT = _with_window(model, params, text_BT, done, count, keys_B, how, prompts)
        yield np.asarray(block_BN)[:, :count]
        done += count


def generate(
    model: Model,
    params: Params,
    prompt_BT: np.ndarray | jax.Array,
    key: jax.Array,
    *,
    max_new_tokens: int,
    **how: Any,
) -> np.ndarray:
    """All new tokens of `stream`, int32 `[B, max_new_tokens]`."""
    blocks = stream(model, params, prompt_BT, key, max_new_tokens=max_new_tokens, **how)
    return np.concatenate(list(blocks), axis=1)


@partial(jax.jit, static_argnames=("model", "how", "length"))
def _read(
    model: Model,
    params: Params,
    prompt_BT: jax.Array,
    keys_B: jax.Array,
    how: Sampling,
    length: int,
    prompts: Prompts | None,
) -> tuple[jax.Array, Cache]:
    """Returns the first new token of each row, and a cache for `length` tokens that holds the prompt's."""
    B, T = prompt_BT.shape
    cache = model.init_cache(B, length, 0 if prompts is None else prompts.tokens_BS.shape[1])

    first = model.first_read if model.first_read < T else 0
    if prompts is not None:
        first = min(T - 1, CHUNK)
    if first:
        cache = model.decode(params, prompt_BT[:, :first], cache, jnp.int32(0), prompts)[1]
        prompts = None  # the cache has them

    def read(cache, i):
        at = first + i * CHUNK
        return model.decode(params, jax.lax.dynamic_slice(prompt_BT, (0, at), (B, CHUNK)), cache, at)[1], None

    # Whole chunks; at least one token is left, whose logits give the first new token.
    chunks = 0 if model.first_read == T else (T - 1 - first) // CHUNK
    if chunks:
        cache, _ = jax.lax.scan(read, cache, jnp.arange(chunks))
    at = first + chunks * CHUNK
    logits_BTV, cache = model.decode(params, prompt_BT[:, at:], cache, jnp.int32(at), prompts)
    return pick(logits_BTV[:, -1], jnp.int32(0), keys_B, how), cache


# `count` is traced, so that one compiled program also serves the last block of a text.


@partial(jax.jit, static_argnames=("model", "how"), donate_argnames="cache")
def _with_cache(
    model: Model,
    params: Params,
    cache: Cache,
    last_B: jax.Array,
    position: jax.Array,
    done: jax.Array,
    count: jax.Array,
    keys_B: jax.Array,
    how: Sampling,
) -> tuple[jax.Array, Cache]:
    """Returns the next `count` tokens, `[B, BLOCK]`, after `last_B`, which is new token done - 1 and has `position`."""

    def one(i, carry):
        token_B, block_BN, cache = carry
        logits_BTV, cache = model.decode(params, token_B[:, None], cache, position + i)
        token_B = pick(logits_BTV[:, -1], done + i, keys_B, how)
        return token_B, block_BN.at[:, i].set(token_B), cache

    block_BN = jnp.zeros((len(last_B), BLOCK), jnp.int32)
    _, block_BN, cache = jax.lax.fori_loop(0, count, one, (last_B, block_BN, cache))
    return block_BN, cache


@partial(jax.jit, static_argnames=("model", "how"))
def _with_window(
    model: Model,
    params: Params,
    window_BT: jax.Array,
    done: jax.Array,
    count: jax.Array,
    keys_B: jax.Array,
    how: Sampling,
    prompts: Prompts | None,
) -> tuple[jax.Array, jax.Array]:
    """Returns the next `count` tokens, `[B, BLOCK]`, each from the last T tokens alone, and the new window."""
    B, T = window_BT.shape

    def one(i, carry):
        window_BT, block_BN = carry
        x_BD = model.hidden(params, window_BT, prompts=prompts).reshape(B, T, -1)[:, -1]
        token_B = pick(model.unembed(params, x_BD), done + i, keys_B, how)
        return jnp.concatenate([window_BT[:, 1:], token_B[:, None]], axis=1), block_BN.at[:, i].set(token_B)

    window_BT, block_BN = jax.lax.fori_loop(0, count, one, (window_BT, jnp.zeros((B, BLOCK), jnp.int32)))
    return block_BN, window_BT


def pick(logits_BV: jax.Array, n: jax.Array, keys_B: jax.Array, how: Sampling) -> jax.Array:
    """Draws new token n of each row, int32 `[B]`."""
    logits_BV = filter_logits(logits_BV, *how)
    if how.temperature == 0:
        return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    draw = jax.vmap(lambda k, logits_V: jax.random.categorical(jax.random.fold_in(k, n), logits_V))
    return draw(keys_B, logits_BV).astype(jnp.int32)


def filter_logits(logits_BV: jax.Array, temperature: float, top_k: int, top_p: float) -> jax.Array:
    """Divides logits by the temperature, and sets those outside top-k and top-p to minus infinity."""
    if temperature > 0:
        # Relative to the largest, and divided by at least 1e-30, which float32 can hold: no overflow near 0.
        logits_BV = (logits_BV - jnp.max(logits_BV, axis=-1, keepdims=True)) / max(temperature, 1e-30)
    vocab = logits_BV.shape[-1]
    if 0 < top_k < vocab:
        kth = jax.lax.top_k(logits_BV, top_k)[0][:, -1:]
        logits_BV = jnp.where(logits_BV < kth, -jnp.inf, logits_BV)
    if top_p < 1:
        sorted_BV = jnp.sort(logits_BV, axis=-1, descending=True)
        probs_BV = jax.nn.softmax(sorted_BV, axis=-1)
        before_BV = jnp.cumsum(probs_BV, axis=-1) - probs_BV
        kept_BV = (before_BV < top_p).at[:, 0].set(True)  # the first token stays, even if top_p rounds to 0 in float32
        least = jnp.min(jnp.where(kept_BV, sorted_BV, jnp.inf), axis=-1, keepdims=True)
        logits_BV = jnp.where(logits_BV < least, -jnp.inf, logits_BV)
    return logits_BV
