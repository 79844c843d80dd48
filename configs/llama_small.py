"""A small Llama that `jaxlm export-hf` gives to `transformers`, on your own text: --config.data.path=FILE_OR_FOLDER.

4 layers of width 192, SwiGLU, RMSNorm, RoPE, no biases; minutes on a laptop's CPU. docs/tutorial.md takes it from text
files to a model that other programs load.
"""

from configs import base
from jaxlm.config import Config


def get_config() -> Config:
    c = base.get_config()
    c.steps = 1000
    m = c.model
    m.activation, m.d_ff = "swiglu", 512
    m.key_offset = False  # no architecture of transformers has it
    m.qk_norm = False  # with it, the model is a Qwen3ForCausalLM
    c.data.source = "text"
    c.eval.every_steps, c.eval.sample_prompt = 250, "The "
    c.checkpoint.every_steps = 250
    return c
