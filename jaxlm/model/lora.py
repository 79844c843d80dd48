"""LoRA (Hu et al., LoRA: Low-Rank Adaptation of Large Language Models, 2021).

A linear layer computes x @ W + dropout(x) @ A @ B * alpha / r, where W stays as it is, and A `[D, r]` and B `[r, F]`
are trained. A starts at random and B at zero, so training starts from the model as it was. Both are float32, whatever
the dtype of W.
"""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from jaxlm.config import ModelConfig
from jaxlm.model.remat import keep

A, B = "lora_a", "lora_b"  # names of the two matrices, beside a layer's kernel
# {a block's linear layer: its number among the places of a block where LoRA drops}
PLACES = {name: i for i, name in enumerate(("query", "key", "value", "out", "up", "gate", "down"))}
Drop = Callable[[jax.Array, str], jax.Array]  # (x_ND, name of the linear layer that reads it) -> x_ND after dropout

# Uniform in +-1 / sqrt(D), as in the authors' code and in `peft`.
init_a = jax.nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


def product(c: ModelConfig, x_ND: jax.Array, a_DR: jax.Array, b_RF: jax.Array) -> jax.Array:
    """What LoRA adds to a layer's output, in the dtype of the computation."""
    h_NR = keep(x_ND @ a_DR.astype(c.dtype))
    return h_NR @ (b_RF * _factor(c)).astype(c.dtype)


def _factor(c: ModelConfig) -> float:
    return c.lora_alpha / c.lora_rank


def merged_kernel(c: ModelConfig, kernel: Any, a: Any, b: Any) -> np.ndarray:
    """A kernel `[..., D, F]` with its LoRA added, float32, from NumPy arrays."""
    return np.asarray(kernel, np.float32) + np.float32(_factor(c)) * (a @ b)


def merged(c: ModelConfig, params: Any) -> Any:
    """A model's parameters without LoRA, which is added to the kernels; NumPy arrays."""
    if not isinstance(params, dict):
        return params
    if A not in params:
        return {name: merged(c, x) for name, x in params.items()}
    return without(params) | {"kernel": merged_kernel(c, params["kernel"], params[A], params[B])}


def without(params: Any) -> Any:
    """A model's parameters without the matrices of LoRA."""
    if not isinstance(params, dict):
        return params
    return {name: without(x) for name, x in params.items() if name not in (A, B)}
