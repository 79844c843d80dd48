"""Continues prompts of different lengths in one batch, without padding on the left.

All rows begin at position 0. They read together what the shortest prompt has. From there on they advance by one
position at a time: a row whose prompt goes on takes its next token from there, any other takes the token that it draws.

Shapes: B rows, S positions of the cache.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxlm.model import Cache, Model, Params
from jaxlm.model.generate import CHUNK, Sampling, pick

PIECES = (CHUNK, 64, 8)  # tokens read in one call: few programs, and at most 7 tokens are left to be read singly


class Rows(NamedTuple):
    """A batch while it grows; the model has read the first `position` tokens of each row."""

    tokens_BS: jax.Array  # int32: prompts, followed by what was drawn
    lengths_B: jax.Array  # int32: of the prompts
    keys_B: jax.Array  # PRNG keys
    cache: Cache


def begin(model: Model, tokens_BS: jax.Array, lengths_B: jax.Array, numbers_B: jax.Array, seed: int) -> Rows:
    """Returns rows of which nothing was read. What a row draws depends only on the seed and its number."""
    keys_B = jax.vmap(lambda number: jax.random.fold_in(jax.random.key(seed), number))(numbers_B)
    return Rows(tokens_BS, lengths_B, keys_B, model.init_cache(*tokens_BS.shape))


def read(model: Model, size: int, params: Params, rows: Rows, position: jax.Array) -> Rows:
    """Reads the next `size` tokens of all prompts, which must be longer than that."""
    piece_BT = jax.lax.dynamic_slice_in_dim(rows.tokens_BS, position, size, axis=1)
    return rows._replace(cache=model.decode(params, piece_BT, rows.cache, position)[1])


def extend(model: Model, how: Sampling, params: Params, rows: Rows, position: jax.Array, count: jax.Array) -> Rows:
    """Reads `count` more tokens of each row, and draws those that follow the prompts. `count` is traced, so that one
    program serves all calls.
    """

    def one(i: jax.Array, rows: Rows) -> Rows:
        at = position + i
        token_B = jax.lax.dynamic_index_in_dim(rows.tokens_BS, at, axis=1, keepdims=True)
        logits_BTV, cache = model.decode(params, token_B, rows.cache, at)
        drawn_B = pick(logits_BTV[:, -1], at, rows.keys_B, how)
        given_B = jax.lax.dynamic_index_in_dim(rows.tokens_BS, at + 1, axis=1, keepdims=False)
        next_B = jnp.where(at + 1 < rows.lengths_B, given_B, drawn_B)
        tokens_BS = jax.lax.dynamic_update_slice_in_dim(rows.tokens_BS, next_B[:, None], at + 1, axis=1)
        return rows._replace(tokens_BS=tokens_BS, cache=cache)

    return jax.lax.fori_loop(0, count, one, rows)
