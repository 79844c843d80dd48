"""A low-rank approximation of the mean of matrices (Vogels et al., PowerSGD, 2019), with error feedback.

One step of subspace iteration on the mean M of the devices' matrices [in, out], which no device ever holds: P = M Q (an
all-reduce of [in, r]); P is made orthonormal; Q = M^T P (an all-reduce of [out, r]). P Q^T is the projection of M on
the columns of P, the same on all devices. The next step starts from this Q (warm start), and so approaches the r
largest singular directions of gradients that change slowly. A device keeps the difference between its own matrix and
P Q^T as its residual.

This applies to the matrices of layers only. Vectors, embeddings, the output layer, and matrices that r columns would
not make smaller are averaged whole, together with P.

Bytes: 2 (N - 1) / N * 4 for r (in + out) numbers of each matrix.
"""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from jaxlm.sync.base import Arrays, Reduction, Shape, State, is_stacked_matrix, magnitudes
from jaxlm.sync.group import Group


def powersgd(group: Group, rank: int) -> Reduction:
    n = group.size

    def is_low_rank(shape: Shape) -> bool:
        return is_stacked_matrix(shape) and rank * (shape[1] + shape[2]) < shape[1] * shape[2]

    def init(array: jax.Array) -> State:
        if not is_low_rank(array.shape):
            return {}
        l, _, out = array.shape
        return {"residual": jnp.zeros_like(array), "q": _random_columns((l, out, rank))}

    def mean(arrays: Arrays, states: list[State]) -> tuple[Arrays, list[State]]:
        low = [i for i, x in enumerate(arrays) if is_low_rank(x.shape)]
        m_LIO = {i: arrays[i] + states[i]["residual"] for i in low}
        message = list(arrays)
        for i in low:
            message[i] = m_LIO[i] @ _unit_columns(states[i]["q"])
        averaged = group.mean(message)
        p_LIr = {i: orthonormal(averaged[i]) for i in low}
        q_LOr = dict(zip(low, group.mean([jnp.swapaxes(m_LIO[i], 1, 2) @ p_LIr[i] for i in low]), strict=True))
        means: Arrays = list(averaged)
        kept: list[State] = [{} for _ in arrays]
        for i in low:
            means[i] = p_LIr[i] @ jnp.swapaxes(q_LOr[i], 1, 2)
            kept[i] = {"residual": m_LIO[i] - means[i], "q": q_LOr[i]}
        return means, kept

    def sent_bytes(shapes: Sequence[Shape], parts: bool) -> float:
        sizes = [s[0] * rank * (s[1] + s[2]) if is_low_rank(s) else math.prod(s) for s in shapes]
        return 2 * (n - 1) / n * 4 * sum(sizes)

    return Reduction(init, mean, None, sent_bytes)


def _random_columns(shape: Shape) -> jax.Array:
    return jax.random.normal(jax.random.key(0), shape)


def _unit_columns(q_LOr: jax.Array) -> jax.Array:
    """Scales columns to length one, and replaces zero columns, which no product would ever change, by random ones.

    Gradients are zero at first if the output layer starts at zero.
    """
    q_LOr = _scaled_to_one(q_LOr)
    norm = jnp.linalg.norm(q_LOr, axis=1, keepdims=True)
    return jnp.where(norm > 0, q_LOr / jnp.where(norm > 0, norm, 1), _random_columns(q_LOr.shape))


def _scaled_to_one(x_LIr: jax.Array) -> jax.Array:
    """Divides each matrix by its largest magnitude, so that no square overflows or underflows. A matrix with a number
    that is not finite becomes NaN.
    """
    largest = jnp.max(magnitudes(x_LIr), axis=(1, 2), keepdims=True)
    return x_LIr / jnp.where(jnp.isfinite(largest), jnp.where(largest > 0, largest, 1), jnp.nan)


def orthonormal(p_LIr: jax.Array) -> jax.Array:
    """Makes columns orthonormal by modified Gram-Schmidt. A column in the span of the previous ones, up to rounding,
    becomes zero, because its remainder would be noise.
    """
    done: list[jax.Array] = []
    rest = p_LIr = _scaled_to_one(p_LIr)
    whole = jnp.linalg.norm(p_LIr, axis=1)
    for i in range(p_LIr.shape[2]):
        column = rest[:, :, i]
        norm = jnp.linalg.norm(column, axis=1, keepdims=True)
        lives = norm > 1e-5 * whole[:, i : i + 1]
        column = jnp.where(lives, column / jnp.where(lives, norm, 1), 0)
        done.append(column)
        # Not a matrix product, whose operands may be rounded (`model.matmul_precision`). The residual absorbs the
        # rounding of all other products.
        rest = rest - column[:, :, None] * jnp.sum(column[:, :, None] * rest, axis=1, keepdims=True)
    return jnp.stack(done, axis=2)
