"""Opens the data that a configuration names. A new kind of source needs an entry here and in `config/sources.py`."""

from collections.abc import Callable

from jaxlm.config import Config, DataConfig
from jaxlm.data.corpus import Corpus
from jaxlm.data.sources.documents import Source
from jaxlm.data.sources.functions import open_functions
from jaxlm.data.sources.jsonl import open_jsonl
from jaxlm.data.sources.parquet import open_parquet
from jaxlm.data.sources.stdlib import open_stdlib
from jaxlm.data.sources.synthetic import open_synthetic
from jaxlm.data.sources.text import open_text
from jaxlm.data.sources.tfds import open_tfds
from jaxlm.data.sources.tokens import open_tokens

# Sources of documents, which are tokenized.
TEXTS: dict[str, Callable[[DataConfig], Source]] = {
    "stdlib": open_stdlib,
    "text": open_text,
    "jsonl": open_jsonl,
    "parquet": open_parquet,
    "tfds": open_tfds,
    "functions": open_functions,
}

# Sources of token ids. The second argument is whether to print notes to stderr.
IDS: dict[str, Callable[[Config, bool], Corpus]] = {"tokens": open_tokens, "synthetic": open_synthetic}


def open_source(data: DataConfig) -> Source:
    """The documents that `data.source` names.

    Raises:
      UserError: there are no documents, or they cannot be read.
    """
    return TEXTS[data.source](data)


def open_ids(config: Config, progress: bool) -> Corpus:
    """The token ids that `data.source` names.

    Raises:
      UserError: there are no ids, they cannot be read, or they do not fit the configuration.
    """
    return IDS[config.data.source](config, progress)
