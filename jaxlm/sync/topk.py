"""The mean of each device's largest numbers only. The others are added to the next step's gradient.

A device sends the k = density * 1024 numbers of each block of 1024 with the largest absolute values, and their places
in the block (Aji and Heafield, Sparse Communication for Distributed Gradient Descent, 2017; Lin et al., Deep Gradient
Compression, 2018). Selecting within blocks needs no sort of the whole gradient, and 16 bits for a place. It keeps the
property that convergence rests on (Stich et al., Sparsified SGD with Memory, 2018): what is left out has at most
(1 - k / 1024) of the squared norm.

This applies to the matrices of layers only. Vectors, embeddings and the output layer are averaged whole: many of their
rows have no gradient in a step, and optimizers that divide by a gradient's size would amplify what arrives late.

Bytes: an all-gather of k numbers (4) and places (2) for each block, so each device sends (N - 1) * 6 k / 1024 for each
number: less than pmean up to N = 8 / 6 / density.
"""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from jaxlm.sync.base import Arrays, Reduction, Shape, State, is_stacked_matrix
from jaxlm.sync.group import Group
from jaxlm.sync.packed import pack, unpack

BLOCK = 1024


def topk(group: Group, density: float) -> Reduction:
    """`density` is the share of the numbers that are sent; at least one of each block is."""
    k = max(1, round(density * BLOCK))

    def init(array: jax.Array) -> State:
        return {"residual": jnp.zeros_like(array)} if is_stacked_matrix(array.shape) else {}

    def mean(arrays: Arrays, states: list[State]) -> tuple[Arrays, list[State]]:
        sparse = [i for i, x in enumerate(arrays) if is_stacked_matrix(x.shape)]
        whole = [i for i, x in enumerate(arrays) if not is_stacked_matrix(x.shape)]
        means, kept = list(arrays), list(states)
        for i, m in zip(whole, group.mean([arrays[i] for i in whole]), strict=True):
            means[i] = m
        if sparse:
            found = mean_of_largest([arrays[i] + states[i]["residual"] for i in sparse])
            for i, m, left in zip(sparse, *found, strict=True):
                means[i], kept[i] = m, {"residual": left}
        return means, kept

    def mean_of_largest(arrays: Arrays) -> tuple[Arrays, Arrays]:
        """(mean of what the devices sent, what this device did not send)"""
        shapes = [x.shape for x in arrays]
        x_RB = pack(arrays, 1, BLOCK).reshape(-1, BLOCK)
        _, place_Rk = jax.lax.top_k(jnp.abs(x_RB), k)
        value_Rk = jnp.take_along_axis(x_RB, place_Rk, axis=1)
        bits_Rk2 = jax.lax.bitcast_convert_type(value_Rk, jnp.uint16)
        message = jnp.concatenate([bits_Rk2, place_Rk[..., None].astype(jnp.uint16)], axis=-1)

        rows = jnp.arange(x_RB.shape[0])[:, None]

        def add(sum_RB: jax.Array, sent: jax.Array) -> tuple[jax.Array, None]:
            value, place = jax.lax.bitcast_convert_type(sent[..., :2], jnp.float32), sent[..., 2]
            return sum_RB.at[rows, place].add(value, unique_indices=True), None

        # One device after the other: all at once, the order of additions would depend on the hardware.
        sum_RB, _ = jax.lax.scan(add, jnp.zeros_like(x_RB), group.gather(message))
        left_RB = x_RB.at[rows, place_Rk].set(0, unique_indices=True)
        return unpack(sum_RB.reshape(1, -1) / group.size, shapes), unpack(left_RB.reshape(1, -1), shapes)

    def sent_bytes(shapes: Sequence[Shape], parts: bool) -> float:
        n = group.size
        sparse = sum(math.prod(s) for s in shapes if is_stacked_matrix(s))
        whole = sum(math.prod(s) for s in shapes if not is_stacked_matrix(s))
        return (n - 1) * -(-sparse // BLOCK) * k * 6 + 2 * (n - 1) / n * 4 * whole

    return Reduction(init, mean, None, sent_bytes)
