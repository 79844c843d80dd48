"""Which intermediate results of a layer are kept for the backward pass. All others are computed again from those.

On GPUs an elementwise operation takes as long as reading and writing its arrays. Computing a norm or an activation
function again, inside the kernel that needs it, costs less than writing it to memory and reading it back.
"""

from collections.abc import Callable
from typing import Any

import jax
from jax.ad_checkpoint import checkpoint_name

from jaxlm.config import ModelConfig

KEPT = "kept"
# How names of the primitives of fused attention begin: cuDNN's, and that in which JAX wraps the Triton kernel. No other
# custom_vjp_call is left in a layer that is differentiated, because differentiation replaces it by its rule.
FUSED_ATTENTION = ("dot_product_attention_fwd", "custom_vjp_call")


def keep(x: jax.Array) -> jax.Array:
    """Marks a result that is costly to compute again: `elementwise` keeps it."""
    return checkpoint_name(x, KEPT)


def _attention(primitive: Any, *_: Any, **__: Any) -> bool:
    """Keeps what fused attention returns: values and the logarithms of the softmax's denominators."""
    return primitive.name.startswith(FUSED_ATTENTION)


_policies = jax.checkpoint_policies

# {model.remat: policy that says which results are kept; None = layer inputs only}. None of them keeps a layer's
# parameters, which ZeRO-3 gathers for the forward pass, and again for the backward pass.
REMAT: dict[str, Callable[..., bool] | None] = {
    "elementwise": _policies.save_from_both_policies(_policies.save_only_these_names(KEPT), _attention),
    "dots": _policies.dots_with_no_batch_dims_saveable,
    "full": None,
}


WIDE = 768  # d_model from which CPUs recompute, too


def layer_loop(c: ModelConfig, platform: str) -> tuple[int, str]:
    """Returns how many layers an iteration of the loop over layers has, and model.remat, with `auto` resolved.

    On GPUs, recomputing elementwise operations is faster than keeping their results and saves two thirds of the memory,
    and a rolled loop compiles in half the time and is a tenth slower (planned, see docs/gpu.md). On CPUs a rolled loop
    costs small models up to half of their speed, and 12 layers of 768 a twentieth; it needs a third less memory there.
    Recomputation needs it: in an unrolled loop, XLA's CPU backend merges it with the first computation.
    """
    remat = c.remat
    if remat == "auto":
        remat = "elementwise" if platform == "gpu" or c.d_model >= WIDE else "none"
    unroll = c.scan_unroll or c.num_layers
    if unroll < 0:
        unroll = c.num_layers if platform == "cpu" and remat == "none" else 1
    return unroll, remat
