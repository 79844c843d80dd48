"""Tokenizers, which turn text into ids and back without loss: one file for each kind."""

from jaxlm.data.tokenizers.base import Tokenizer, to_bytes
from jaxlm.data.tokenizers.loading import load_tokenizer, make_tokenizer

__all__ = ["Tokenizer", "load_tokenizer", "make_tokenizer", "to_bytes"]
