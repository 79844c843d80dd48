"""Llama 3's 405 billion parameters on your own text, planned for 1,024 GPUs of 80 GB and more:
--config.data.path=FILE_OR_FOLDER.

126 layers of width 16384, 128 query and 8 key/value heads (Grattafiori et al., The Llama 3 Herd of Models, table 3).
`jaxlm plan --recommend` finds grids for other numbers of devices (docs/parallelism.md).
"""

from configs import llama_70b
from jaxlm.config import Config


def get_config() -> Config:
    c = llama_70b.get_config()
    c.batch_size = 2048  # 16 million tokens
    m = c.model
    m.num_layers, m.d_model, m.num_heads, m.num_kv_heads, m.d_ff = 126, 16384, 128, 8, 53248
    c.optim.lr = 8e-5
    return c
