"""A tiny model of synthetic data that trains in seconds on any machine, to see whether a change still trains."""

from configs import base
from jaxlm.config import Config


def get_config() -> Config:
    c = base.get_config()
    c.steps = 100
    c.batch_size = 8
    c.seq_len = 64
    c.model.num_layers = 2
    c.model.d_model = 64
    c.model.num_heads = 2
    c.data.source = "synthetic"  # can be learned: the best possible loss is ln 4 = 1.386
    c.data.vocab_size = 64
    c.eval.every_steps = 50
    c.checkpoint.every_steps = 50
    return c
