"""The mean with 8 bits per number. The rounding error is added to the next step's gradient.

A block of 256 numbers shares a scale, its largest absolute value divided by the largest integer. Numbers are rounded to
the nearest multiple of the scale. There are two ways:

- two phases, for any N (as in Dettmers, 8-Bit Approximations for Parallelism in Deep Learning, 2015, with the phases of
  a ring): each device sends to every other device the part that the other owns, in 8 bits, with its own scale for each
  block. The owner adds up in float32, quantizes the sum and sends it to all. 127 levels each way.
- a sum of integers by an all-reduce: devices first agree on the scales (a small all-reduce of maxima), and use only
  127 // N levels each way, so that sums fit 8 bits. That suits few devices on a backend whose all-reduce alone comes
  near the speed of the wire: Gloo, between CPUs.

Error feedback (Seide et al., 1-Bit SGD, 2014; Karimireddy et al., Error Feedback Fixes SignSGD, 2019): a device adds
the rounding error of its numbers to its next gradient. The owner adds the error of its second rounding to its own
residual. Over the steps nothing is lost.

Bytes for each number, either way: 2 (N - 1) / N * (1 + 4 / 256). Error of an element: half a scale for each rounding,
if no scale is subnormal.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from jaxlm.sync.base import Arrays, Reduction, Shape, State, magnitudes
from jaxlm.sync.group import Group
from jaxlm.sync.packed import pack, row_size, unpack, unpack_parts

BLOCK = 256
LEVELS = 127


def int8(group: Group, integer_sum: bool) -> Reduction:
    """With `integer_sum`, by an all-reduce of integers, for at most 127 devices; otherwise in two phases."""
    n = group.size

    def init(array: jax.Array) -> State:
        return {"residual": jnp.zeros_like(array)}

    def with_residuals(arrays: Arrays, states: list[State], rows: int) -> jax.Array:
        return pack([x + s["residual"] for x, s in zip(arrays, states, strict=True)], rows, BLOCK)

    def new_residuals(error_NC: jax.Array, arrays: Arrays) -> list[State]:
        return [{"residual": r} for r in unpack(error_NC, [x.shape for x in arrays])]

    def reduce_scatter(x_NC: jax.Array) -> tuple[jax.Array, jax.Array]:
        """(this device's row of the sum, the rounding error of its own numbers)"""
        sent = quantize(x_NC)
        return jnp.sum(dequantize(group.exchange(sent)), axis=0), x_NC - dequantize(sent)

    def mean_two_phases(arrays: Arrays, states: list[State]) -> tuple[Arrays, list[State]]:
        own_C, error_NC = reduce_scatter(with_residuals(arrays, states, n))
        sent = quantize(own_C)
        error_NC = error_NC.at[group.index()].add(own_C - dequantize(sent))
        mean_NC = dequantize(group.gather(sent)) / n
        return unpack(mean_NC, [x.shape for x in arrays]), new_residuals(error_NC, arrays)

    def mean_integer_sum(arrays: Arrays, states: list[State]) -> tuple[Arrays, list[State]]:
        x_1C = with_residuals(arrays, states, 1)
        scale_1K = block_scales(x_1C, LEVELS // n, group)
        q_1C = to_int8(x_1C, scale_1K)
        mean_1C = from_int8(group.sum(q_1C), scale_1K / n)
        return unpack(mean_1C, [x.shape for x in arrays]), new_residuals(x_1C - from_int8(q_1C, scale_1K), arrays)

    def mean_parts(arrays: Arrays, states: list[State]) -> tuple[Arrays, list[State]]:
        own_C, error_NC = reduce_scatter(with_residuals(arrays, states, n))
        return unpack_parts(own_C / n, [x.shape for x in arrays], n), new_residuals(error_NC, arrays)

    def sent_bytes(shapes: Sequence[Shape], parts: bool) -> float:
        if integer_sum and not parts:
            return 2 * (n - 1) / n * row_size(shapes, 1, BLOCK) * (1 + 4 / BLOCK)
        return (1 if parts else 2) * (n - 1) * row_size(shapes, n, BLOCK) * (1 + 4 / BLOCK)

    return Reduction(init, mean_integer_sum if integer_sum else mean_two_phases, mean_parts, sent_bytes)


def block_scales(x: jax.Array, levels: int, group: Group | None = None) -> jax.Array:
    """[..., C] -> [..., C / 256]: each block's largest absolute value / levels; with a group, over its devices."""
    largest = jnp.max(magnitudes(x).reshape(*x.shape[:-1], -1, BLOCK), axis=-1)
    return (largest if group is None else group.max(largest)) / levels


def to_int8(x: jax.Array, scale: jax.Array) -> jax.Array:
    """[..., C] -> int8: the nearest multiples of the scales."""
    blocks = x.reshape(*scale.shape, BLOCK) / jnp.maximum(scale, jnp.finfo(scale.dtype).tiny)[..., None]
    return jnp.round(blocks).astype(jnp.int8).reshape(x.shape)


def from_int8(q: jax.Array, scale: jax.Array) -> jax.Array:
    """The inverse of `to_int8`; not finite where the scale is not."""
    return (q.reshape(*scale.shape, BLOCK) * scale[..., None]).reshape(q.shape)


def quantize(x: jax.Array) -> jax.Array:
    """float32 [..., C] -> int8 [..., C + C / 64]: integers, then the bytes of the scales, as one message."""
    scale = block_scales(x, LEVELS)
    bytes_of_scale = jax.lax.bitcast_convert_type(scale, jnp.int8)
    return jnp.concatenate([to_int8(x, scale), bytes_of_scale.reshape(*x.shape[:-1], -1)], axis=-1)


def dequantize(message: jax.Array) -> jax.Array:
    """The inverse of `quantize`."""
    size = message.shape[-1] * BLOCK // (BLOCK + 4)
    q, bytes_of_scale = message[..., :size], message[..., size:]
    scale = jax.lax.bitcast_convert_type(bytes_of_scale.reshape(*q.shape[:-1], -1, 4), jnp.float32)
    return from_int8(q, scale)
