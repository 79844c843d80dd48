"""Checks how a configuration divides work among devices, and whether the model divides accordingly."""

import math
from collections.abc import Callable
from typing import get_args

from jaxlm.config import Config, ModelConfig, ParallelConfig, key_types, refused_reductions

Require = Callable[[bool, str, str], None]  # (whether a key's value is right, the key, what is allowed)


def check_parallel(c: Config, require: Require) -> None:
    """Checks the keys of `parallel`, and what other keys must be with them."""
    _check_exchange(c.parallel, c.model, require)
    _check_grid(c, require)
    _check_pipeline(c, require)


def _check_exchange(p: ParallelConfig, m: ModelConfig, require: Require) -> None:
    d_ff = m.mlp_width
    require(p.zero <= 3, "parallel.zero", "0 to 3")
    require(1 / 1024 <= p.topk_density <= 1, "parallel.topk_density", "1/1024 (one number of each block) to 1")
    require(p.bucket_mb <= 1e6, "parallel.bucket_mb", "at most 1e6")
    # At a higher rank, the two factors of the MLP's matrices are not smaller than the matrices.
    most = math.ceil(m.d_model * d_ff / (m.d_model + d_ff)) - 1
    require(
        0 < p.powersgd_rank <= most or p.reduce != "powersgd",
        "parallel.powersgd_rank",
        f"1 to {most}, with matrices of {m.d_model} x {d_ff}",
    )
    if p.zero:
        why = "which gathers whole parameters" if p.zero == 1 else "where no device holds a whole gradient"
        refused = refused_reductions(p.zero)
        others = [name for name in get_args(key_types()["parallel.reduce"]) if name not in refused]
        require(p.reduce in others, "parallel.reduce", f"with parallel.zero={p.zero}, {why}: {', '.join(others)}")
    require(
        p.zero < 3 or m.remat != "none",
        "model.remat",
        "with parallel.zero=3, which keeps no layer's parameters for the backward pass: auto, elementwise, dots, full",
    )


def _check_grid(c: Config, require: Require) -> None:
    """What the devices of tensor and context groups divide evenly among them; a few key/value heads they share."""
    m, tensor, context = c.model, c.parallel.tensor, c.parallel.context
    for key, count in (("model.num_heads", m.num_heads), ("model.d_ff", m.mlp_width)):
        require(count % tensor == 0, key, f"a multiple of parallel.tensor = {tensor}")
    shared = m.kv_heads % tensor == 0 or tensor % m.kv_heads == 0
    require(shared, "model.num_kv_heads", f"a multiple or a divisor of parallel.tensor = {tensor}")
    if context > 1:
        require(c.seq_len % (2 * context) == 0, "seq_len", f"a multiple of 2 * parallel.context = {2 * context}")
        why = "with parallel.context, which does not know the longest text: none, linear, llama3"
        require(m.rope_scaling != "longrope", "model.rope_scaling", why)
        why = "with parallel.context, whose attention is its own: auto, xla"
        require(m.attention in ("auto", "xla"), "model.attention", why)
    if m.encoder_layers:
        require(context == 1, "parallel.context", "with model.encoder_layers, 1")
        require(m.encoder_len % tensor == 0, "model.encoder_len", f"a multiple of parallel.tensor = {tensor}")
    size = c.seq_len // context
    require(size % tensor == 0, "seq_len", f"a multiple of parallel.context * parallel.tensor = {context * tensor}")


def _check_pipeline(c: Config, require: Require) -> None:
    p = c.parallel
    if p.pipeline == 1:
        require(p.chunks == 1, "parallel.chunks", "with parallel.pipeline=1, 1")
        return
    least = max(p.pipeline, p.pipeline * (p.chunks - 1) + 1)  # so that at most the last chunks are empty
    allowed = f"with parallel.pipeline={p.pipeline} and parallel.chunks={p.chunks}, at least {least}"
    require(c.model.num_layers >= least, "model.num_layers", allowed)
    require(p.zero < 2, "parallel.zero", "with parallel.pipeline, whose stages add up whole gradients: 0 or 1")
    require(not p.overlap, "parallel.overlap", "with parallel.pipeline, whose gradients are complete at the end: false")
    require(c.model.dtype != "float16", "model.dtype", "with parallel.pipeline, float32 or bfloat16")
    require(not c.model.encoder_layers, "model.encoder_layers", "with parallel.pipeline, 0: stages have equal layers")
    require(not c.log.layer_stats, "log.layer_stats", "with parallel.pipeline, false")
