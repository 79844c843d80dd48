"""Cross-entropy of the output layer as sums over tokens. A mean needs the number of targets in the global batch, which
only the step knows.

Negative targets do not count.

Shapes: N flat tokens, D d_model, V vocabulary.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxlm.config import LossConfig
from jaxlm.model.tensor import ALONE, Tensor

Unembed = Callable[[Any, jax.Array], jax.Array]  # (weights, final states x_ND) -> float32 logits_NV


LOWEST = float(jnp.finfo(jnp.float32).min)  # not -inf: the difference of two of them would be NaN


class LossSums(NamedTuple):
    """Sums over target tokens; float32 scalars."""

    objective: jax.Array  # what is minimized: with label smoothing and z-loss
    nll: jax.Array  # plain negative log-likelihood, nats
    correct: jax.Array  # number of targets with the largest logit
    targets: jax.Array  # number of target tokens


def cross_entropy(
    logits_NV: jax.Array,
    targets_N: jax.Array,
    config: LossConfig,
    tensor: Tensor = ALONE,
    vocab_size: int | None = None,
) -> tuple[LossSums, jax.Array]:
    """Returns the sums of the token losses, and the gradient of the objective with respect to the logits, `[N, V]`.

    The smoothed target is (1 - s) * one_hot + s / V (Szegedy et al., section 7); z-loss adds z * log(Z)^2 for each
    token (PaLM, section 5). So the gradient is softmax * (1 + 2 z log(Z)) - smoothed target.

    With several devices, the logits are those of this device's tokens; columns from `vocab_size` on do not count.
    """
    s, z, columns = config.label_smoothing, config.z_loss, logits_NV.shape[1]
    V, first = vocab_size or columns, tensor.index() * columns
    column_V = first + jnp.arange(columns)
    if extra := columns * tensor.size > V:
        logits_NV = jnp.where(column_V < V, logits_NV, LOWEST)
    max_N, log_z_N = max_and_logsumexp(logits_NV)
    gold_N, sum_N = gold_and_sum(logits_NV, targets_N - first, column_V < V)
    if tensor.size > 1:
        own_z_N, max_N = log_z_N, tensor.max(max_N)
        z_N, gold_N, sum_N = tensor.sum(jnp.stack([jnp.exp(own_z_N - max_N), gold_N, sum_N]))
        log_z_N = max_N + jnp.log(z_N)

    nll_N = log_z_N - gold_N
    counts_N = (targets_N >= 0).astype(jnp.float32)
    objective_N, softmax_factor_N = nll_N, counts_N
    if s:
        objective_N = (1 - s) * nll_N + s * (log_z_N - sum_N / V)
    if z:
        objective_N += z * jnp.square(log_z_N)
        softmax_factor_N = counts_N * (1 + 2 * z * log_z_N)

    of_tokens = LossSums(objective_N, nll_N, gold_N >= max_N, jnp.ones_like(nll_N))
    sums = LossSums(*[jnp.sum(x_N * counts_N) for x_N in of_tokens])

    # One-hot by comparison: the gradient of an indexed logit would be a scatter, another pass over memory.
    smoothed_NV = jnp.where(column_V == targets_N[:, None], 1 - s + s / V, s / V)
    softmax_NV = jnp.exp(logits_NV - log_z_N[:, None])
    grad_NV = softmax_NV * softmax_factor_N[:, None] - smoothed_NV * counts_N[:, None]
    return sums, jnp.where(column_V < V, grad_NV, 0) if extra else grad_NV


def gold_and_sum(logits_NV: jax.Array, at_N: jax.Array, counts_V: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The logit at each row's target, 0 if it is not among the columns; and the sum of the logits that count."""
    there_N = (at_N >= 0) & (at_N < logits_NV.shape[1])
    gold_N = jnp.take_along_axis(logits_NV, jnp.where(there_N, at_N, 0)[:, None], axis=-1)[:, 0]
    return jnp.where(there_N, gold_N, 0), jnp.sum(logits_NV, axis=-1, where=counts_V)


def max_and_logsumexp(logits_NV: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Largest logit and log(Z) of each row. CPUs read the logits twice, because XLA does not vectorize the reduction of
    pairs there.
    """
    max_N, sum_N = jax.lax.platform_dependent(logits_NV, cpu=read_twice, default=read_once)
    return max_N, max_N + jnp.log(sum_N)


def read_once(logits_NV: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Each row's largest logit, and sum of exp(logit - largest) (Milakov and Gimelshein, Online normalizer calculation
    for softmax).
    """

    def combine(a: tuple[jax.Array, jax.Array], b: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        top = jnp.maximum(a[0], b[0])
        return top, a[1] * jnp.exp(a[0] - top) + b[1] * jnp.exp(b[0] - top)

    start = jnp.float32(LOWEST), jnp.float32(0)
    return jax.lax.reduce((logits_NV, jnp.ones_like(logits_NV)), start, combine, (1,))


def read_twice(logits_NV: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The same as `read_once`."""
    max_N = logits_NV.max(axis=-1)
    return max_N, jnp.exp(logits_NV - max_N[:, None]).sum(axis=-1)


def output_loss(
    unembed: Unembed,
    weights: Any,
    x_ND: jax.Array,
    targets_N: jax.Array,
    config: LossConfig,
    scale: jax.Array | float = 1.0,
    tensor: Tensor = ALONE,
    vocab_size: int | None = None,
) -> LossSums:
    """Returns the sums of the token losses, for final states that `unembed` turns into logits. Only the objective has
    a gradient. Like its gradient, it is multiplied by `scale`.

    With `config.chunk`, logits and their gradients exist for only that many tokens at a time.

    The gradient is computed in the forward pass, while the logits of a chunk exist, so that no logits are kept or
    computed again (Hsu et al., Liger Kernel, section 3.2).

    With several devices, the sums are those of whole logits, and the gradients this device's parts of them.
    """
    of_logits = partial(cross_entropy, config=config, tensor=tensor, vocab_size=vocab_size)

    def losses(weights: Any, x_ND: jax.Array, targets_N: jax.Array, scale: jax.Array) -> LossSums:
        def one(weights: Any, x_ND: jax.Array, targets_N: jax.Array) -> tuple[LossSums, tuple[()]]:
            return of_logits(unembed(weights, x_ND), targets_N)[0], ()

        return _scaled(in_chunks(one, config.chunk, weights, x_ND, targets_N)[0], scale)

    def forward(weights: Any, x_ND: jax.Array, targets_N: jax.Array, scale: jax.Array) -> tuple[LossSums, Any]:
        def one(low: Any, x_ND: jax.Array, targets_N: jax.Array) -> tuple[Any, jax.Array]:
            logits_NV, pull_back = jax.vjp(unembed, jax.tree.map(lambda a, w: a.astype(w.dtype), low, weights), x_ND)
            sums, grad_NV = of_logits(logits_NV, targets_N)
            weights_grad, x_grad_ND = pull_back(grad_NV * scale)
            return (sums, weights_grad), x_grad_ND

        # Converts once, not in each chunk. `one` converts back, which gives gradients the weights' own dtype, and which
        # the compiler removes.
        low = jax.tree.map(lambda w: w.astype(x_ND.dtype), weights)
        (sums, weights_grad), x_grad_ND = in_chunks(one, config.chunk, low, x_ND, targets_N)
        return _scaled(sums, scale), (weights_grad, x_grad_ND)

    def backward(grads: tuple[Any, jax.Array], cotangents: LossSums) -> tuple[Any, jax.Array, None, None]:
        weights_grad, x_grad_ND = jax.tree.map(lambda g: g * cotangents.objective.astype(g.dtype), grads)
        return weights_grad, x_grad_ND, None, None

    differentiable = jax.custom_vjp(losses)
    differentiable.defvjp(forward, backward)
    return differentiable(weights, x_ND, targets_N, jnp.asarray(scale, jnp.float32))


def _scaled(sums: LossSums, scale: jax.Array) -> LossSums:
    return sums._replace(objective=sums.objective * scale)


def in_chunks(
    act: Callable[..., tuple[Any, Any]], chunk: int, weights: Any, x_ND: jax.Array, targets_N: jax.Array
) -> tuple[Any, Any]:
    """Applies `act` to `chunk` tokens at a time (0 = all), adds up its first results and joins the second ones, which
    have a row for each token.
    """
    N = len(x_ND)
    if not 0 < chunk < N:
        return act(weights, x_ND, targets_N)
    count = -(-N // chunk)
    pad = count * chunk - N

    def split(x: jax.Array, fill: int) -> jax.Array:
        padded = jnp.pad(x, [(0, pad)] + [(0, 0)] * (x.ndim - 1), constant_values=fill)
        return padded.reshape(count, chunk, *x.shape[1:])

    def one(total: Any, part: tuple[jax.Array, jax.Array]) -> tuple[Any, Any]:
        summed, rows = act(weights, *part)
        return jax.tree.map(jnp.add, total, summed), rows

    parts = split(x_ND, 0), split(targets_N, -1)
    like = jax.eval_shape(act, weights, *jax.tree.map(lambda x: x[0], parts))[0]
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), like)
    total, rows = jax.lax.scan(one, zeros, parts)
    return total, jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[:N], rows)
