"""Llama 3's 8 billion parameters on your own text, on 8 GPUs of 80 GB or more: --config.data.path=FILE_OR_FOLDER.

32 layers of width 4096, 32 query and 8 key/value heads, SwiGLU, RMSNorm, RoPE, no biases (Grattafiori et al., The Llama
3 Herd of Models, table 3). ZeRO-3: each of N devices holds 1/N of the weights, the gradient and AdamW's two moments,
16 bytes per parameter, and gathers the weights of one layer after the other.
"""

from configs import llama_1b
from jaxlm.config import Config


def get_config() -> Config:
    c = llama_1b.get_config()
    c.batch_size, c.seq_len = 128, 8192  # a million tokens
    m = c.model
    m.num_layers, m.d_model, m.num_heads, m.num_kv_heads, m.d_ff = 32, 4096, 32, 8, 14336
    m.rope_theta = 500_000.0
    c.optim.lr, c.optim.warmup_steps, c.optim.accum_steps = 3e-4, 8000, 16
    c.parallel.zero = 3
    c.data.vocab_size = 128_256
    return c
