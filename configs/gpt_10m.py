"""A GPT of 10.7 M parameters, nanoGPT's character model: 6 layers of 384, sequences of 256, AdamW.

The model that exchanging gradients is measured with (tools/netbench.py); to train it on a text of yours, say
--config.data.path=input.txt. The last tenth is held out.
"""

from configs import base
from jaxlm.config import Config


def get_config() -> Config:
    c = base.get_config()
    c.steps = 5000
    c.batch_size = 64
    c.seq_len = 256
    c.model.num_layers = 6
    c.model.d_model = 384
    c.model.num_heads = 6
    c.model.activation = "gelu"
    c.model.qk_norm = False
    c.optim.name = "adamw"
    c.optim.lr = 1e-3
    c.data.source = "text"
    c.data.tokenizer = "chars"
    c.data.val_fraction = 0.1
    c.eval.every_steps = 250
    c.eval.sample_prompt = "\n"
    c.checkpoint.every_steps = 1000
    return c
