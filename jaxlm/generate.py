"""Sampling from a model with a key/value cache."""

from functools import partial

import jax
import jax.numpy as jnp

from jaxlm.model import Model, Params

CHUNK = 512  # tokens of a prompt read at once: attention needs memory for each of them times all before it


@partial(jax.jit, static_argnames=("model", "max_new_tokens", "temperature", "top_k", "top_p"))
def generate(
    model: Model,
    params: Params,
    prompt_BT: jax.Array,
    key: jax.Array,
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
) -> jax.Array:
    """Continues each prompt; returns the new tokens, int32 `[B, max_new_tokens]`.

    Row i is a function of the key and i alone: it does not change with the number of rows.

    Args:
      model: functions of the decoder.
      prompt_BT: at least one token each.
      temperature: 0 takes the most probable token.
      top_k: samples among the k most probable; 0 = all.
      top_p: samples among the most probable that together have this probability (Holtzman et al.).
    """
    B, T = prompt_BT.shape
    keys_B = jax.vmap(lambda row: jax.random.fold_in(key, row))(jnp.arange(B))
    cache = model.init_cache(B, T + max_new_tokens)

    def read(cache, i):
        chunk_BT = jax.lax.dynamic_slice(prompt_BT, (0, i * CHUNK), (B, CHUNK))
        return model.decode(params, chunk_BT, cache, i * CHUNK)[1], None

    chunks = (T - 1) // CHUNK  # whole ones; one token at least is left, whose logits begin the text
    if chunks:
        cache, _ = jax.lax.scan(read, cache, jnp.arange(chunks))
    logits_BTV, cache = model.decode(params, prompt_BT[:, chunks * CHUNK :], cache, jnp.int32(chunks * CHUNK))

    def pick(logits_BV: jax.Array, n: jax.Array) -> jax.Array:
        logits_BV = filter_logits(logits_BV, temperature, top_k, top_p)
        if temperature == 0:
            return jnp.argmax(logits_BV, axis=-1)
        draw = jax.vmap(lambda k, logits_V: jax.random.categorical(jax.random.fold_in(k, n), logits_V))
        return draw(keys_B, logits_BV)

    def one(carry, n):
        token_B, cache = carry
        logits_BTV, cache = model.decode(params, token_B[:, None], cache, T + n)
        return (pick(logits_BTV[:, -1], n + 1), cache), token_B

    first_B = pick(logits_BTV[:, -1], jnp.int32(0))
    (last_B, _), tokens_TB = jax.lax.scan(one, (first_B, cache), jnp.arange(max_new_tokens - 1))
    return jnp.concatenate([tokens_TB, last_B[None]]).T


def filter_logits(logits_BV: jax.Array, temperature: float, top_k: int, top_p: float) -> jax.Array:
    """Logits over the temperature, with those outside top-k and top-p at minus infinity."""
    if temperature > 0:
        # From the largest on, and by no less than float32 can divide by: near 0 only the most probable token is left.
        logits_BV = (logits_BV - jnp.max(logits_BV, axis=-1, keepdims=True)) / max(temperature, 1e-30)
    vocab = logits_BV.shape[-1]
    if 0 < top_k < vocab:
        kth = jax.lax.top_k(logits_BV, top_k)[0][:, -1:]
        logits_BV = jnp.where(logits_BV < kth, -jnp.inf, logits_BV)
    if top_p < 1:
        sorted_BV = jnp.sort(logits_BV, axis=-1, descending=True)
        probs_BV = jax.nn.softmax(sorted_BV, axis=-1)
        before_BV = jnp.cumsum(probs_BV, axis=-1) - probs_BV
        kept_BV = (before_BV < top_p).at[:, 0].set(True)  # the first one stays, even where top_p is 0 in float32
        least = jnp.min(jnp.where(kept_BV, sorted_BV, jnp.inf), axis=-1, keepdims=True)
        logits_BV = jnp.where(logits_BV < least, -jnp.inf, logits_BV)
    return logits_BV
