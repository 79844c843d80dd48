"""How some devices compute one model together: tensor and sequence parallelism.

The first matrices of attention and MLP are split by columns, the last ones by rows, so a device computes some heads and
some of the hidden units (Shoeybi et al., Megatron-LM, 2019). What is left are sums over the devices. Between them, each
device has some of the rows, for norms, dropout and the residual stream (Korthikanti et al., Reducing Activation
Recomputation in Large Transformer Models, 2022):

    rows [n, D] -> norm -> gather [N, D] -> some columns [N, F / T] -> partial sums [N, D] -> scatter -> rows [n, D]

Token tables are split by tokens. A device then computes the logits of its tokens, and none ever holds all logits.

Every device differentiates its own part of the loss. A parameter's gradient is therefore the sum over the devices that
hold it (sync/cuts.py), and `gather` and `scatter` are each other's gradients.

Shapes: T devices, N tokens, n = N / T of them, D any number of columns.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


def _same(x: Any) -> Any:
    return x


class Tensor(NamedTuple):
    """What a device does together with its neighbours; alone, nothing."""

    size: int = 1  # T
    index: Callable[[], jax.Array | int] = lambda: 0  # this device's place, 0 ... T - 1
    gather: Callable[[jax.Array], jax.Array] = _same  # [n, D] -> [N, D]
    scatter: Callable[[jax.Array], jax.Array] = _same  # partial sums [N, D] -> this device's rows of their sum [n, D]
    sum: Callable[[jax.Array], jax.Array] = _same  # over the devices; has no gradient
    max: Callable[[jax.Array], jax.Array] = _same  # the same

    def own(self, x: jax.Array, dim: int = 0) -> jax.Array:
        """This device's part of an array along a dimension that the devices divide."""
        if self.size == 1:
            return x
        size = x.shape[dim] // self.size
        return jax.lax.dynamic_slice_in_dim(x, self.index() * size, size, dim)

    def alone(self) -> "Tensor":
        """The same without any exchange, for shapes: what arrives is made up."""
        return self._replace(
            index=lambda: 0,
            gather=lambda x: jnp.tile(x, (self.size, 1)),
            scatter=lambda x: x[: len(x) // self.size],
            sum=_same,
            max=_same,
        )

    def part(self, count: int) -> int:
        """How many of `count` a device has, rounded up."""
        return -(-count // self.size)


def look_up(tensor: Tensor, table_VD: jax.Array, tokens_N: jax.Array) -> jax.Array:
    """Looks tokens up in this device's rows of a table: `[N, D]`, with zeros for the tokens of other devices."""
    at_N = tokens_N - tensor.index() * len(table_VD)
    found_ND = jnp.take(table_VD, jnp.clip(at_N, 0, len(table_VD) - 1), axis=0)
    return jnp.where(((at_N >= 0) & (at_N < len(table_VD)))[:, None], found_ND, 0)


ALONE = Tensor()
