"""Text to token ids and back: the tokenizer that a configuration or a folder names."""

import json
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np

from jaxlm.config import DataConfig, UserError
from jaxlm.data.sentencepiece_tokenizer import (
    CHUNK,
    SAMPLE_CHARACTERS,
    SentencePieceTokenizer,
    spread_sample,
    train_sentencepiece,
)
from jaxlm.data.tokenizer_base import SPEC, ByteTokenizer, CharTokenizer, Tokenizer, code_points, to_bytes

__all__ = ["Tokenizer", "code_points", "load_tokenizer", "make_tokenizer", "to_bytes"]

Texts = Callable[[], Iterable[str]]  # the documents, anew at each call


def make_tokenizer(data: DataConfig, train_texts: Texts, all_texts: Texts) -> Tokenizer:
    """The tokenizer that `data.tokenizer` names, loaded or trained.

    Args:
      train_texts, all_texts: the corpus without and with its validation documents.

    Raises:
      UserError: the model cannot be loaded, or the corpus is no good to train one.
    """
    if data.tokenizer_path:
        return load_tokenizer(data.tokenizer_path)
    if data.tokenizer == "bytes":
        return ByteTokenizer()
    if data.tokenizer == "chars":
        seen = np.zeros(0x110000, bool)
        for text in all_texts():
            seen[code_points(text)] = True
        return CharTokenizer([chr(c) for c in np.flatnonzero(seen)])
    sample = spread_sample((c for text in train_texts() for c in CHUNK.findall(text)), SAMPLE_CHARACTERS)
    model = train_sentencepiece(sample, data.vocab_size, data.sentencepiece)
    return SentencePieceTokenizer(model, lossless=True, name="trained model")


def load_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer in a folder that `save` wrote, or a sentencepiece model file.

    Raises:
      UserError: there is none, or it is unusable.
    """
    path = Path(path).expanduser()
    if path.name == "sentencepiece.model" and (path.parent / "tokenizer.json").is_file():
        path = path.parent
    if path.is_file():
        return SentencePieceTokenizer(path.read_bytes(), lossless=False, name=str(path))
    try:
        spec = json.loads((path / "tokenizer.json").read_text("utf-8"))
        if spec["kind"] == "bytes":
            return ByteTokenizer()
        if spec["kind"] == "chars":
            return CharTokenizer(spec["alphabet"])
        if spec["kind"] == "sentencepiece":
            model = path / "sentencepiece.model"
            return SentencePieceTokenizer(model.read_bytes(), spec["lossless"], str(model))
    except FileNotFoundError as error:
        raise UserError(f"{error.filename}: no such file; allowed: a tokenizer folder or a .model file") from None
    except UserError:
        raise
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path / 'tokenizer.json'}: unreadable ({error})") from error
    raise UserError(f"{path / 'tokenizer.json'}: kind is {spec['kind']!r}; allowed: bytes, chars, sentencepiece")
