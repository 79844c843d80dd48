"""nanoGPT's larger character model (10.7M parameters): 6 layers of width 384, batches of 64 x 256 characters.

tools/netbench.py measures the exchange of gradients with this model. It trains on any text, like shakespeare_char.py:
--config.data.path=input.txt.
"""

from configs import shakespeare_char
from jaxlm.config import Config


def get_config() -> Config:
    c = shakespeare_char.get_config()
    c.steps = 5000
    c.batch_size = 64
    c.seq_len = 256
    c.model.num_layers = 6
    c.model.d_model = 384
    c.model.num_heads = 6
    c.model.activation = "gelu"
    c.model.qk_norm = False
    c.model.key_offset = False
    c.parallel.powersgd_rank = 4  # as in the comparison in docs/communication.md
    o = c.optim
    o.name, o.lr, o.b1, o.b2, o.weight_decay = "adamw", 1e-3, 0.9, 0.95, 0.0
    return c
