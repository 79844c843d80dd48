"""Log-likelihoods of continuations, batched over all devices.

Shapes: B rows of a device, T tokens, K continuation tokens, N = B * K, D d_model, V vocabulary.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.interop.batches import Devices, filled, padded_length, power_of_two
from jaxlm.model import Model, Params
from jaxlm.model.losses import in_chunks, max_and_logsumexp
from jaxlm.run.open_run import Run

LOGITS = 2**24  # most logits that a device holds at a time: 64 MB


class Pair(NamedTuple):
    """A text to score: the log-likelihood of the continuation after the context. Neither is empty."""

    context: Sequence[int]
    continuation: Sequence[int]


class Score(NamedTuple):
    log_likelihood: float  # nats, summed over the continuation
    is_greedy: bool  # whether each of its tokens is the most probable one


class Scorer:
    """Scores pairs with the model of a run. The model sees the last `max_length` tokens of a text, without its last
    one; no continuation is longer.
    """

    def __init__(self, run: Run, devices: Devices, max_length: int, rows: int | None):
        self._config, self._devices, self._max_length, self._rows = run.config.model, devices, max_length, rows
        function = partial(_score, run.model, max(1, LOGITS // run.vocab_size))
        self._program = devices.program(function, in_axes=(None, 0, 0, 0))

    def __call__(self, pairs: Sequence[Pair], done: Callable[[int], Any] = lambda count: None) -> list[Score]:
        """Returns the scores in the order of the pairs. Calls `done` with the number of pairs of each batch."""
        scores: dict[int, Score] = {}
        texts = [[*p.context, *p.continuation][-(self._max_length + 1) : -1] for p in pairs]
        shapes = [self._shape(len(t), len(p.continuation)) for t, p in zip(texts, pairs, strict=True)]
        for (T, K), found, size in self._devices.batches(shapes, lambda shape: shape[0], self._rows):
            tokens_BT = filled([texts[i] for i in found], (size, T), 0)
            targets_BK = filled([pairs[i].continuation for i in found], (size, K), -1)
            first_B = np.zeros(size, np.int32)
            first_B[: len(found)] = [len(texts[i]) - len(pairs[i].continuation) for i in found]
            batch = [self._devices.split(x) for x in (tokens_BT, first_B, targets_BK)]
            logp_BK, greedy_BK = (np.asarray(x).reshape(size, K) for x in self._program(self._devices.params, *batch))
            for row, i in enumerate(found):
                n = len(pairs[i].continuation)
                total = float(logp_BK[row, :n].sum(dtype=np.float64))
                scores[i] = Score(total, bool(greedy_BK[row, :n].all()))
            done(len(found))
        return [scores[i] for i in range(len(pairs))]

    def _shape(self, tokens: int, targets: int) -> tuple[int, int]:
        """(T, K) of a row. K is a power of four: most answers are short, and logits cost more than padding."""
        T = padded_length(tokens, self._max_length, self._config)
        bits = power_of_two(targets).bit_length() - 1
        return T, min(T, 4 ** -(-bits // 2))


def _score(
    model: Model, chunk: int, params: Params, tokens_BT: jax.Array, first_B: jax.Array, targets_BK: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Returns of each target its log-probability, float32, and whether it is the most probable token, both `[B, K]`.

    Args:
      chunk: number of tokens whose logits exist at a time.
      first_B: place of the token that predicts the first target.
      targets_BK: negative where there is none.
    """
    (B, T), K = tokens_BT.shape, targets_BK.shape[1]
    x_BTD = model.hidden(params, tokens_BT).reshape(B, T, -1)
    at_BK = jnp.minimum(first_B[:, None] + jnp.arange(K), T - 1)
    x_ND = jnp.take_along_axis(x_BTD, at_BK[:, :, None], axis=1).reshape(B * K, -1)

    def one(weights: Any, x_ND: jax.Array, targets_N: jax.Array) -> tuple[tuple[()], tuple[jax.Array, jax.Array]]:
        logits_NV = model.unembed(weights, x_ND)
        gold_N = jnp.take_along_axis(logits_NV, jnp.maximum(targets_N, 0)[:, None], axis=-1)[:, 0]
        return (), (gold_N - max_and_logsumexp(logits_NV)[1], jnp.argmax(logits_NV, axis=-1) == targets_N)

    _, (logp_N, greedy_N) = in_chunks(one, chunk, model.output_params(params), x_ND, targets_BK.reshape(-1))
    return logp_N.reshape(B, K), greedy_N.reshape(B, K)
