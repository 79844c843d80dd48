"""An encoder and a decoder that name functions: from a docstring of Python's standard library to the function's name.

The encoder reads the docstring in both directions; the decoder writes the name. Trains in minutes on two CPU
cores, without a download. docs/encoder_decoder.md says what it learns.
"""

from configs import base
from jaxlm.config import Config


def get_config() -> Config:
    c = base.get_config()
    c.steps = 600
    c.batch_size = 32
    c.seq_len = 48  # tokens of the names in a row: several short names fit beside their docstrings
    c.model.num_layers = 2
    c.model.encoder_layers = 2
    c.model.encoder_len = 192  # tokens of the docstrings in a row
    c.model.d_model = 128
    c.model.num_heads = 2
    c.model.dropout = 0.1  # there are only 6,000 functions
    c.data.source = "functions"
    c.data.prompt_key = "docstring"
    c.data.response_key = "name"
    c.data.chat_template = ""  # docstrings and names as they are
    c.data.packing = "document"
    c.data.val_fraction = 0.1
    c.data.vocab_size = 512  # short pieces, which occur both in docstrings and in names
    c.eval.every_steps = 200
    c.eval.sample_prompt = "Return the number of bytes that were written to the file."
    return c
