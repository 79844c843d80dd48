"""A Llama-like model of 1.1 billion parameters (TinyLlama's sizes) on your own text: --config.data.path=FILE_OR_FOLDER.

22 layers of width 2048, 32 query and 4 key/value heads, SwiGLU, RMSNorm, RoPE, no biases. Every device holds master
weights, gradient and AdamW's two moments in float32: 16 bytes per parameter, so it needs 40 GB of memory or more. With
--config.parallel.zero=3 they are shared among the devices.
"""

from configs import base
from jaxlm.config import Config


def get_config() -> Config:
    c = base.get_config()
    c.steps = 100_000
    c.batch_size = 512
    c.seq_len = 2048
    m = c.model
    m.num_layers, m.d_model, m.num_heads, m.num_kv_heads, m.d_ff = 22, 2048, 32, 4, 5632
    m.activation, m.norm, m.position, m.qk_norm = "swiglu", "rmsnorm", "rope", False
    m.key_offset = False
    m.residual_init = "scaled"
    m.dtype, m.scan_unroll = "bfloat16", 0
    o = c.optim
    o.name, o.lr, o.b1, o.b2, o.weight_decay = "adamw", 4e-4, 0.9, 0.95, 0.1
    o.schedule, o.warmup_steps, o.min_lr_ratio = "cosine", 2000, 0.1
    o.accum_steps = 8
    c.loss.chunk = 4096
    c.data.source = "text"
    c.data.vocab_size = 32_000
    c.data.val_fraction = 0.005
    c.eval.every_steps, c.eval.batches, c.eval.baselines = 1000, 20, False
    c.checkpoint.every_steps = 1000
    return c
