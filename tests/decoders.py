"""Tiny decoders, with parameters for which an error in any part shows."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from jaxlm.config import ModelConfig, files
from jaxlm.model import Model, Params
from tests.runs import ROOT

VOCAB, MAX_LEN = 13, 12
BASE = files.load(ROOT / "configs/base.py")
TINY = dataclasses.replace(
    BASE.model,
    num_layers=2,
    d_model=16,
    num_heads=4,
    num_kv_heads=0,
    d_ff=20,
    activation="gelu",
    norm="layernorm",
    position="rope",
    rope_theta=100.0,
    use_bias=False,
    tie_embeddings=False,
    dropout=0.0,
    logit_softcap=0.0,
    qk_norm=False,
    key_offset=False,
    residual_init="scaled",
    dtype="float32",
    param_dtype="float32",
    matmul_precision="highest",
    attention="xla",
    remat="none",
    scan_unroll=1,
)


def logits_of(model: Model) -> Callable[[Params, Any], jax.Array]:
    """Returns a function of (params, tokens_BT) that returns float32 logits_BTV."""
    return lambda params, tokens_BT: model.unembed(params, model.hidden(params, tokens_BT)).reshape(
        *tokens_BT.shape, -1
    )


def with_(**changes: Any) -> ModelConfig:
    return dataclasses.replace(TINY, **changes)


def drawn(model: Model) -> Params:
    """Draws parameters whose scales are not 1, whose biases are not 0, and that give logits of order 1."""
    rng = np.random.default_rng(0)

    def draw(path: Any, x: Any) -> np.ndarray:
        noise = 0.35 * rng.standard_normal(x.shape)
        return np.asarray(noise + (path[-1].key == "scale"), np.float32)

    return jax.tree_util.tree_map_with_path(draw, model.shapes())


def some_tokens(*shape: int, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, VOCAB, shape).astype(np.int32)
