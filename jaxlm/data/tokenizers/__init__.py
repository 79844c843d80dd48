"""From text to ids and back, without a loss: one file for each kind of tokenizer."""

from jaxlm.data.tokenizers.base import Tokenizer, to_bytes
from jaxlm.data.tokenizers.loading import load_tokenizer, make_tokenizer

__all__ = ["Tokenizer", "load_tokenizer", "make_tokenizer", "to_bytes"]
