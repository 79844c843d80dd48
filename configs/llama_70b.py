"""Llama 3's 70 billion parameters on your own text, planned for 128 GPUs of 80 GB: --config.data.path=FILE_OR_FOLDER.

80 layers of width 8192, 64 query and 8 key/value heads (Grattafiori et al., The Llama 3 Herd of Models, table 3).
`jaxlm plan --recommend` finds grids for other numbers of devices (docs/parallelism.md).
"""

from configs import llama_8b
from jaxlm.config import Config


def get_config() -> Config:
    c = llama_8b.get_config()
    c.batch_size = 512  # four million tokens
    m = c.model
    m.num_layers, m.d_model, m.num_heads, m.num_kv_heads, m.d_ff = 80, 8192, 64, 8, 28672
    m.scan_unroll = 1  # unrolled, 80 layers take minutes to compile
    c.optim.lr, c.optim.accum_steps = 1.5e-4, 1
    return c
