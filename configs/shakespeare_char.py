"""A character model of one text, with nanoGPT's CPU budget: 4 layers of width 128, 2000 steps of 12 x 64 characters.

Meant for tiny Shakespeare, but any text will do: --config.data.path=input.txt. The last tenth is held out.
"""

from configs import base
from jaxlm.config import Config


def get_config() -> Config:
    c = base.get_config()
    c.steps = 2000
    c.batch_size = 12
    c.seq_len = 64
    c.model.d_model = 128
    c.model.num_heads = 4
    c.data.source = "text"
    c.data.tokenizer = "chars"
    c.data.val_fraction = 0.1
    c.eval.every_steps = 250
    c.eval.sample_prompt = "\n"
    c.checkpoint.every_steps = 1000
    return c
