"""Adds up gradients over micro-batches: before the mean over the devices, or with each micro-batch's mean.

None of the results depends on the number of micro-batches, up to rounding: losses are sums over tokens.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxlm.config import STACKS
from jaxlm.model import Params
from jaxlm.sync import GradSync, overlap
from jaxlm.train.optimizer import is_matrix

Sums = Any  # tree of sums over this device's tokens


def micro_batches(tree: Any, count: int) -> Any:
    """[B, ...] -> [count, B / count, ...]"""
    return jax.tree.map(lambda x: x.reshape(count, x.shape[0] // count, *x.shape[1:]), tree)


def converted(params: Params, dtype: str, outer: bool = False) -> Params:
    """Parameters, or parts of them, with the layers' matrices in another dtype; with `outer`, all matrices."""

    def one(path: Any, p: jax.Array) -> jax.Array:
        return p.astype(dtype) if is_matrix(path) and (outer or path[0].key in STACKS) else p

    return jax.tree_util.tree_map_with_path(one, params)


def accumulate(loss: Callable, params: Params, micro: Any, matrices: str) -> tuple[Params, Sums]:
    """Adds up gradient and sums of `loss` over micro-batches `[count, ...]`, in float32, one micro-batch at a time.

    It averages nothing, so the result does not depend on their number.

    Args:
      matrices: the dtype in which layers multiply. Several micro-batches get the layers' matrices converted to it once,
        instead of converting them in each.
    """
    grad = jax.grad(loss, has_aux=True)
    first = jax.tree.map(lambda x: x[0], micro)
    if len(jax.tree.leaves(micro)[0]) == 1:
        return grad(params, *first)

    low = converted(params, matrices)

    def add(total: Any, part: Any) -> tuple[Any, None]:
        return jax.tree.map(lambda a, b: a + b.astype(a.dtype), total, grad(low, *part)), None

    shapes = jax.eval_shape(grad, params, *first)
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    return jax.lax.scan(add, zeros, micro)[0]


def fixed_to(params: Params, batch: Any) -> tuple[Params, Any]:
    """The identity. It keeps XLA from gathering parameters before the loop over micro-batches, where all would be whole
    at once.
    """
    return jax.lax.optimization_barrier((params, batch))


def accumulate_parts(
    loss: Callable, params: Params, micro: Any, sync: GradSync, sync_state: Any
) -> tuple[Params, Sums, Any]:
    """`accumulate` for ZeRO-2 and 3: each layer's gradient is reduced as soon as it is complete, in every micro-batch,
    and only this device's parts of the means are added up.

    Args:
      sync_state: without content, because no reduction that has one keeps a part of it.
    """

    def grad(*part: Any) -> tuple[Params, Sums]:
        held, part = fixed_to(params, part)
        grads, _, sums = overlap.gradients(
            lambda params, on_layer: loss(params, *part, on_layer), held, None, sync, sync_state
        )
        return grads, sums

    first = jax.tree.map(lambda x: x[0], micro)
    if len(jax.tree.leaves(micro)[0]) == 1:
        return *grad(*first), sync_state
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(grad, *first))
    total, _ = jax.lax.scan(lambda total, part: (jax.tree.map(jnp.add, total, grad(*part)), None), zeros, micro)
    return *total, sync_state


def accumulate_overlapped(
    loss: Callable, params: Params, micro: Any, matrices: str, sync: GradSync, sync_state: Any, always: jax.Array
) -> tuple[Params, Sums, Any]:
    """`accumulate`, with the reduction over the devices during the backward pass of the last micro-batch.

    Args:
      always: True on all devices, which the compiler does not know. It makes the last micro-batch a branch, because a
        branch allocates nothing before it is taken. Otherwise XLA would allocate what the last backward pass keeps
        before the earlier ones run, which doubles the memory.
    """

    def reduced(before: Params | None, last: Any) -> tuple[Params, Any, Sums]:
        return overlap.gradients(
            lambda params, on_layer: loss(params, *last, on_layer), params, before, sync, sync_state
        )

    last = jax.tree.map(lambda x: x[-1], micro)
    if len(jax.tree.leaves(micro)[0]) == 1:
        grads, sync_state, sums = reduced(None, last)
        return grads, sums, sync_state
    before, sums = accumulate(loss, params, jax.tree.map(lambda x: x[:-1], micro), matrices)
    nothing = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(reduced, before, last))
    grads, sync_state, last_sums = jax.lax.cond(always, reduced, lambda *_: nothing, before, last)
    return grads, jax.tree.map(jnp.add, sums, last_sums), sync_state
