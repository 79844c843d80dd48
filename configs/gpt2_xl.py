"""GPT-2's largest model (1.56 billion parameters) on your own text: --config.data.path=FILE_OR_FOLDER.

48 layers of width 1600 with 25 heads. Master weights, gradient and AdamW's two moments in float32 take 25 GB on every
device, or a part of that with --config.parallel.zero=3.
"""

from configs import gpt2_124m
from jaxlm.config import Config


def get_config() -> Config:
    c = gpt2_124m.get_config()
    m = c.model
    m.num_layers, m.d_model, m.num_heads = 48, 1600, 25
    c.optim.lr = 2e-4  # Brown et al., Language Models are Few-Shot Learners, table 2.1
    c.batch_size, c.optim.accum_steps = 512, 4
    return c
