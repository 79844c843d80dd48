"""Helpers that write and open small corpora, for the tests of the data."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from configs.base import get_config
from jaxlm.config import Config
from jaxlm.data import Corpus, prepare
from jaxlm.data.baselines import text_of
from jaxlm.data.corpus import MixtureSource
from jaxlm.data.sources.documents import Document, Source
from jaxlm.data.tokens import Tokens, chain

LINES = "".join(f"line {i}: the quick brown fox jumps over the lazy dog\r\n" for i in range(400))


def make_config(tmp_path: Path) -> Config:
    config = get_config()
    config.seq_len = 16
    config.data.source, config.data.tokenizer = "text", "bytes"
    config.data.cache_dir = str(tmp_path / "cache")
    return config


def write(folder: Path, files: Mapping[str, str | bytes]) -> Path:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    return folder


def open_corpus(config: Config, path: Path | str, **keys: object) -> Corpus:
    config.data.path = str(path)
    for key, value in keys.items():
        setattr(config.data, key, value)
    return prepare(config, progress=False)


def text(corpus: Corpus, split: str) -> str:
    assert corpus.tokenizer is not None
    return text_of(getattr(corpus, split), corpus.tokenizer).decode()


def documents(source: Source, split: str) -> list[Document]:
    """Returns the documents of a split, unit by unit."""
    found = [document for unit in source.units() for document in unit.read()]
    return [d for d in found if isinstance(d, Document) and d.split == split]


def corpus_of(*sets: np.ndarray) -> Corpus:
    """Returns a corpus that trains and validates on the same ids. Several sets make a mixture of sources a, b, ..."""
    parts = [Tokens([ids]) for ids in sets]
    shares = tuple(MixtureSource("abcdef"[i], 1 / len(parts), part, part) for i, part in enumerate(parts))
    return Corpus(
        train=chain(parts),
        val=chain(parts),
        vocab_size=1 + max(int(ids.max()) for ids in sets),
        tokenizer=None,
        bytes_per_token=None,
        fingerprint="",
        folder=None,
        facts={},
        shares=shares if len(parts) > 1 else (),
    )
