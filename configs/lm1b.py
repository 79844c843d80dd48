"""The One Billion Word Benchmark (Chelba et al.) from TFDS; --config.data.path=DATA_DIR names a prepared copy.

The decoder has the size of Flax's lm1b example: 6 layers of width 512.
"""

from configs import base
from jaxlm.config import Config


def get_config() -> Config:
    c = base.get_config()
    c.steps = 500_000
    c.batch_size = 256
    c.seq_len = 128
    m = c.model
    m.num_layers, m.d_model, m.num_heads, m.d_ff = 6, 512, 8, 2048
    m.residual_init = "scaled"
    m.dtype = "bfloat16"
    m.scan_unroll = 1
    o = c.optim
    o.name, o.lr, o.b1, o.b2, o.weight_decay = "adamw", 1.6e-3, 0.9, 0.95, 0.1
    o.schedule, o.warmup_steps = "rsqrt", 1000
    c.data.source = "tfds"
    c.data.tfds_name, c.data.split, c.data.val_split = "lm1b", "train", "test"
    c.data.vocab_size = 30_000
    c.eval.every_steps, c.eval.batches, c.eval.baselines = 1000, 20, False
    c.checkpoint.every_steps = 1000
    return c
