"""From files to batches: sources give documents, tokenizers turn them into ids, the store keeps the ids, the order
decides which ids are in batch N, and the stream makes batches before the devices need them.

Importing this room does not import tensorflow, tensorflow_datasets, sentencepiece or jax. Other rooms import the names
below from here, and `prompts` and `sources.conversations` as modules.

May import: config, host.
"""

from jaxlm.data.baselines import compression_baselines
from jaxlm.data.corpus import Corpus
from jaxlm.data.order import TrainOrder
from jaxlm.data.prepare import prepare
from jaxlm.data.scoring import Scored, eval_batches, num_eval_batches
from jaxlm.data.store_reader import open_store
from jaxlm.data.stream import Share, TrainStream, train_stream
from jaxlm.data.tokenizers import Tokenizer, load_tokenizer

__all__ = [
    "Corpus",
    "Scored",
    "Share",
    "Tokenizer",
    "TrainOrder",
    "TrainStream",
    "compression_baselines",
    "eval_batches",
    "load_tokenizer",
    "num_eval_batches",
    "open_store",
    "prepare",
    "train_stream",
]
