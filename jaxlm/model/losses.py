"""Cross-entropy as sums over tokens. A mean needs the number of targets in the global batch, which only the step knows.

Negative targets do not count.

Shapes: N flat tokens, D d_model, V vocabulary.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxlm.config import LossConfig


class LossSums(NamedTuple):
    """Sums over target tokens; float32 scalars."""

    objective: jax.Array  # what is minimized: with label smoothing and z-loss
    nll: jax.Array  # plain negative log-likelihood, nats
    correct: jax.Array  # number of targets with the largest logit
    targets: jax.Array  # number of target tokens


def cross_entropy(logits_NV: jax.Array, targets_N: jax.Array, config: LossConfig) -> LossSums:
    """Returns the sums of the token losses.

    The smoothed target is (1 - s) * one_hot + s / V (Szegedy et al., section 7); z-loss adds
    z * log(Z)^2 for each token (PaLM, section 5).
    """
    log_z_N = jax.nn.logsumexp(logits_NV, axis=-1)
    gold_N = jnp.take_along_axis(logits_NV, targets_N[:, None], axis=-1)[:, 0]
    nll_N = log_z_N - gold_N
    objective_N = nll_N
    if config.label_smoothing:
        s = config.label_smoothing
        objective_N = (1 - s) * nll_N + s * (log_z_N - logits_NV.mean(axis=-1))
    if config.z_loss:
        objective_N += config.z_loss * jnp.square(log_z_N)
    correct_N = (jnp.argmax(logits_NV, axis=-1) == targets_N).astype(jnp.float32)

    counts_N = (targets_N >= 0).astype(jnp.float32)

    def total(x_N: jax.Array) -> jax.Array:
        return jnp.sum(x_N * counts_N)

    return LossSums(total(objective_N), total(nll_N), total(correct_N), jnp.sum(counts_N))


def output_loss(
    unembed: Callable[[jax.Array], jax.Array], x_ND: jax.Array, targets_N: jax.Array, config: LossConfig
) -> LossSums:
    """Returns the sums of the token losses, for final states that `unembed` turns into logits.

    With `config.chunk`, the logits of only that many tokens exist at a time, and the backward pass recomputes them.
    """
    if not config.chunk or config.chunk >= x_ND.shape[0]:
        return cross_entropy(unembed(x_ND), targets_N, config)
    chunks = -(-x_ND.shape[0] // config.chunk)
    pad = chunks * config.chunk - x_ND.shape[0]

    def split(x: jax.Array, fill: int) -> jax.Array:
        padded = jnp.pad(x, [(0, pad)] + [(0, 0)] * (x.ndim - 1), constant_values=fill)
        return padded.reshape(chunks, config.chunk, *x.shape[1:])

    @jax.checkpoint
    def one(sums: LossSums, chunk: tuple[jax.Array, jax.Array]) -> tuple[LossSums, None]:
        x, targets = chunk
        return jax.tree.map(jnp.add, sums, cross_entropy(unembed(x), targets, config)), None

    zero = LossSums(*[jnp.zeros((), jnp.float32)] * 4)
    return jax.lax.scan(one, zero, (split(x_ND, 0), split(targets_N, -1)))[0]
