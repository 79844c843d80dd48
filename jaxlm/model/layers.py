"""Layers of the decoder: linear layers, MLP, norms, dropout, sinusoids, output layer. Shape names as in blocks.py."""

import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxlm.config import ModelConfig
from jaxlm.model import lora
from jaxlm.model.context import WHOLE, Context
from jaxlm.model.norms import normalize
from jaxlm.model.remat import keep
from jaxlm.model.tensor import ALONE, Tensor


def relu2(x: jax.Array) -> jax.Array:
    """Squared ReLU (So et al., Primer)."""
    return jnp.square(nn.relu(x))


def gelu(x: jax.Array) -> jax.Array:
    """GELU by its tanh approximation, computed in float32 (Hendrycks and Gimpel, section 2).

    (1 + tanh(u)) / 2 = sigmoid(2u). XLA would not fuse a tanh with all that needs it, but write its result to memory.
    """
    x32 = x.astype(jnp.float32)
    return (x32 * nn.sigmoid(math.sqrt(8 / math.pi) * (x32 + 0.044715 * x32**3))).astype(x.dtype)


# {model.activation: (function, gated)}; if gated, the function of a second projection multiplies the first one
ACTIVATIONS: dict[str, tuple[Callable[[jax.Array], jax.Array], bool]] = {
    "gelu": (gelu, False),
    "relu": (nn.relu, False),
    "relu2": (relu2, False),
    "swiglu": (nn.silu, True),  # Shazeer, GLU Variants Improve Transformer
    "geglu": (gelu, True),
}


ROW_PARALLEL = ("out", "down")  # linear layers that several devices split by rows; all others by columns


class Mlp(nn.Module):
    """down(f(up(x))), or if gated down(up(x) * f(gate(x))).

    Several devices compute some of the hidden units each, from all rows `[N, D]` to some, `[n, D]`.
    """

    config: ModelConfig
    tensor: Tensor

    @nn.compact
    def __call__(self, x_ND: jax.Array, drop: lora.Drop) -> jax.Array:
        c = self.config
        width = self.tensor.part(c.mlp_width)
        h_NF = linear(c, width, "up", keep_product=True)(x_ND, drop)
        function, gated = ACTIVATIONS[c.activation]
        if gated:
            h_NF *= function(linear(c, width, "gate", keep_product=True)(x_ND, drop))
        else:
            h_NF = function(h_NF)
        return linear(c, c.d_model, "down", residual=True, join=self.tensor.scatter)(h_NF, drop)


class Linear(nn.Module):
    """x @ kernel + bias in the dtype of the computation, with LoRA if the layer has it."""

    config: ModelConfig
    features: int
    kernel_init: Any
    use_bias: bool
    keep_product: bool  # keep x @ kernel for the backward pass, which adds the bias again
    join: Callable[[jax.Array], jax.Array]  # applied to x @ kernel

    @nn.compact
    def __call__(self, x_ND: jax.Array, drop: lora.Drop) -> jax.Array:
        c = self.config
        kernel_DF = self.param("kernel", self.kernel_init, (x_ND.shape[-1], self.features), c.param_dtype)
        y_NF = x_ND @ kernel_DF.astype(c.dtype)
        if self.name and c.has_lora(self.name):
            a_DR = self.param(lora.A, lora.init_a, (x_ND.shape[-1], c.lora_rank), jnp.float32)
            b_RF = self.param(lora.B, nn.initializers.zeros, (c.lora_rank, self.features), jnp.float32)
            y_NF += lora.product(c, drop(x_ND, self.name), a_DR, b_RF)
        if self.keep_product:
            y_NF = keep(y_NF)
        y_NF = self.join(y_NF)
        if self.use_bias:
            y_NF += self.param("bias", nn.initializers.zeros, (self.features,), c.param_dtype).astype(c.dtype)[None]
        return y_NF


def linear(
    c: ModelConfig,
    features: int,
    name: str,
    *,
    residual: bool = False,
    keep_product: bool = False,
    bias: bool = False,
    join: Callable[[jax.Array], jax.Array] = lambda y: y,
) -> Linear:
    """A linear layer, with a bias if `bias` or the configuration says so; its weights start with standard deviation
    1 / sqrt(fan in).

    With `residual`, its output is added to the residual stream: its weights start smaller by a factor of sqrt(n), for n
    such layers (GPT-2, section 2.3), or, with residual_init=zero, at zero, so that each block starts as the identity.
    `join` is applied to the product, before the bias is added.
    """
    init = RESIDUAL_INITS[c.residual_init](c) if residual else _fan_in(1.0)
    return Linear(c, features, init, c.use_bias or bias, keep_product, join, name=name)


def _fan_in(variance: float) -> Any:
    return nn.initializers.variance_scaling(variance, "fan_in", "normal")


RESIDUAL_INITS: dict[str, Callable[[ModelConfig], Any]] = {
    "scaled": lambda c: _fan_in(1 / c.residual_branches),
    "zero": lambda c: nn.initializers.zeros,
}


class Norm(nn.Module):
    """`normalize` with its parameters."""

    config: ModelConfig
    center: bool
    use_bias: bool
    eps: float

    @nn.compact
    def __call__(self, x_RC: jax.Array) -> jax.Array:
        shape, dtype = x_RC.shape[-1:], self.config.param_dtype
        scale_C = self.param("scale", nn.initializers.ones, shape, dtype)
        bias_C = self.param("bias", nn.initializers.zeros, shape, dtype) if self.use_bias else None
        return normalize(x_RC, scale_C, bias_C, self.center, self.eps)


def norm(c: ModelConfig, name: str | None = None) -> Norm:
    """A norm over rows `[R, C]`; its statistics are float32, whatever the dtype of the computation.

    Inputs have two dimensions, because with more of them XLA's CPU backend computes the gradient's sums along rows
    seven times slower (measured for products of two arrays, jax 0.10.2).
    """
    return NORMS[c.norm](c, name)


def layernorm(c: ModelConfig, name: str | None) -> Norm:
    return Norm(c, center=True, use_bias=c.use_bias, eps=c.norm_eps or 1e-5, name=name)


def rmsnorm(c: ModelConfig, name: str | None) -> Norm:
    return Norm(c, center=False, use_bias=False, eps=c.norm_eps or 1e-6, name=name)


NORMS: dict[str, Callable[[ModelConfig, str | None], Norm]] = {"layernorm": layernorm, "rmsnorm": rmsnorm}


def dropout(
    x_ND: jax.Array,
    rate: float,
    keys_B: jax.Array | None,
    site: jax.Array | int,
    tensor: Tensor = ALONE,
    context: Context = WHOLE,
    dim: int = 0,
) -> jax.Array:
    """Inverted dropout with one key per sequence, so that masks do not depend on how the batch is split.

    `site` numbers the places in the model where dropout is applied. Without keys, as in evaluation, nothing is dropped.
    With several devices, x is this device's part, along `dim` and of each sequence's tokens.
    """
    if rate == 0.0 or keys_B is None:
        return x_ND
    shape = [size * tensor.size if i == dim else size for i, size in enumerate(x_ND.shape)]
    S, D = shape[0] * context.size // keys_B.shape[0], shape[1]
    keep_BSD = jax.vmap(lambda key: jax.random.bernoulli(jax.random.fold_in(key, site), 1 - rate, (S, D)))(keys_B)
    return jnp.where(tensor.own(context.own(keep_BSD, 1).reshape(shape), dim), x_ND / (1 - rate), 0)


def sinusoids(positions: jax.Array, dim: int) -> jax.Array:
    """Sinusoidal position embeddings `[..., D]` (Vaswani et al., section 3.5): sines, then cosines."""
    angles = positions[..., None] * jnp.exp(-math.log(10_000) * jnp.arange(0, dim, 2) / dim)
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)


class Head(nn.Module):
    """A separate output layer, for untied embeddings. It starts at zero."""

    config: ModelConfig
    rows: int

    @nn.compact
    def __call__(self, x_ND: jax.Array) -> jax.Array:
        c = self.config
        kernel_DV = self.param("kernel", nn.initializers.zeros, (c.d_model, self.rows), c.param_dtype)
        return logits_of(x_ND, kernel_DV)


@jax.custom_vjp
def logits_of(x_ND: jax.Array, w_DV: jax.Array) -> jax.Array:
    """Logits `[N, V]`, accumulated and returned in float32, because 16 bits would make ties among the largest logits.

    All products have operands in the dtype of x. The gradient of the weights is accumulated in theirs.
    """
    return jnp.dot(x_ND, w_DV.astype(x_ND.dtype), preferred_element_type=jnp.float32)


def _logits_backward(operands: tuple[jax.Array, jax.Array], g_NV: jax.Array) -> tuple[jax.Array, jax.Array]:
    x_ND, w_DV = operands
    g_NV = g_NV.astype(x_ND.dtype)
    return g_NV @ w_DV.T.astype(x_ND.dtype), jnp.dot(x_ND.T, g_NV, preferred_element_type=w_DV.dtype)


logits_of.defvjp(lambda x_ND, w_DV: (logits_of(x_ND, w_DV), (x_ND, w_DV)), _logits_backward)
