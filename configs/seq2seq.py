"""An encoder and a decoder that name functions: from a docstring to the function's name, for Python's standard library.

Each prompt is a docstring, which the encoder reads in both directions; the answer, which the decoder writes, is the
name. Trains in minutes on a laptop's CPU, without a download. docs/encoder_decoder.md says what it learns.
"""

from configs import base
from jaxlm.config import Config


def get_config() -> Config:
    c = base.get_config()
    c.steps = 600
    c.batch_size = 32
    c.seq_len = 32  # tokens of names in a row
    c.model.num_layers = 2
    c.model.encoder_layers = 2
    c.model.encoder_len = 128  # tokens of docstrings in a row
    c.model.d_model = 128
    c.model.num_heads = 2
    c.data.source = "functions"
    c.data.prompt_key = "docstring"
    c.data.response_key = "name"
    c.data.chat_template = ""  # docstrings and names as they are
    c.data.packing = "document"
    c.data.val_fraction = 0.1
    c.eval.every_steps = 200
    c.eval.sample_prompt = "Return the sum of two numbers."
    return c
