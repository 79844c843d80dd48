"""GPT-2's smallest model (124M parameters) on your own text: --config.data.path=FILE_OR_FOLDER.

Sizes, position embedding, norm and activation are GPT-2's. Batch (half a million tokens per step), schedule and AdamW's
values are from nanoGPT's reproduction.
"""

from configs import base
from jaxlm.config import Config


def get_config() -> Config:
    c = base.get_config()
    c.steps = 600_000
    c.batch_size = 480
    c.seq_len = 1024
    m = c.model
    m.num_layers, m.d_model, m.num_heads = 12, 768, 12
    m.activation, m.norm, m.position = "gelu", "layernorm", "learned"
    m.use_bias, m.tie_embeddings, m.qk_norm = True, True, False
    m.key_offset = False
    m.residual_init = "scaled"
    m.dtype = "bfloat16"
    m.scan_unroll = 0
    o = c.optim
    o.name, o.lr, o.b1, o.b2, o.weight_decay = "adamw", 6e-4, 0.9, 0.95, 0.1
    o.schedule, o.warmup_steps, o.min_lr_ratio = "cosine", 2000, 0.1
    o.accum_steps = 5
    c.loss.chunk = 4096
    c.data.source = "text"
    c.data.vocab_size = 50_257
    c.data.val_fraction = 0.005
    c.eval.every_steps, c.eval.batches, c.eval.baselines = 1000, 20, False
    c.checkpoint.every_steps = 1000
    return c
