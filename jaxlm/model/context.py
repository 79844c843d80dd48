"""How some devices share each sequence: context parallelism.

Each of C devices holds two of the 2 C chunks of every sequence: device i the chunks i and 2 C - 1 - i, in this order.
So all do the same work for causal attention, in which late tokens see more than early ones (Zhu, ring-flash-attention,
"zigzag"; Dubey et al., The Llama 3 Herd of Models, section 3.3.2). Only attention looks at other tokens (ring.py).

Shapes: C devices, S tokens of a sequence, T = S / C of them on this device.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp


class Context(NamedTuple):
    size: int = 1  # C
    index: Callable[[], jax.Array | int] = lambda: 0  # this device's place, 0 ... C - 1
    # (x, n) -> what the device n places before this one sent, on a ring
    shift: Callable[[jax.Array, int], jax.Array] = lambda x, n: x

    def alone(self) -> "Context":
        """The same without any exchange, for shapes: what arrives is made up."""
        return self._replace(index=lambda: 0, shift=lambda x, by: x)

    def own(self, x: jax.Array, dim: int) -> jax.Array:
        """This device's tokens of an array with all S along a dimension."""
        if self.size == 1:
            return x
        size = x.shape[dim] // (2 * self.size)
        chunks = [jax.lax.dynamic_slice_in_dim(x, i * size, size, dim) for i in self._chunks(self.index())]
        return jnp.concatenate(chunks, axis=dim)

    def positions(self, tokens: int, index: jax.Array | int | None = None) -> jax.Array:
        """The places in the sequence of the T tokens of a device, by default this one; int32 [T]."""
        if self.size == 1:
            return jnp.arange(tokens)
        size = tokens // 2
        chunks = self._chunks(self.index() if index is None else index)
        return jnp.concatenate([i * size + jnp.arange(size) for i in chunks])

    def previous(self, x_BTX: jax.Array) -> jax.Array:
        """For each token, x of the one before it; zeros for the first token of a sequence. [B, T, ...]"""
        if self.size == 1:
            return jnp.pad(x_BTX, [(0, 0), (1, 0)] + [(0, 0)] * (x_BTX.ndim - 2))[:, :-1]
        early, late = jnp.split(x_BTX, 2, axis=1)
        before = jnp.zeros_like(early[:, :1])
        first, last = self.index() == 0, self.index() == self.size - 1
        # The chunk before this device's early one is its neighbour's early one, and so on with late ones.
        before_early = jnp.where(first, before, self.shift(early[:, -1:], 1))
        before_late = jnp.where(last, early[:, -1:], self.shift(late[:, -1:], -1))
        return jnp.concatenate([before_early, early[:, :-1], before_late, late[:, :-1]], axis=1)

    def _chunks(self, index: jax.Array | int) -> tuple[jax.Array | int, jax.Array | int]:
        return index, 2 * self.size - 1 - index


WHOLE = Context()  # of a device that has whole sequences
