"""Data, in the order it flows: files -> documents -> sources (records, conversations) -> tokenizers -> store
(build) -> order (packing) -> stream.

`prepare` turns what `data.*` names into a `Corpus` of token ids, once; `train_stream` and `eval_batches` cut batches
out of it. Importing this package imports none of tensorflow, tensorflow_datasets, sentencepiece and jax.
"""

from jaxlm.data.baselines import compression_baselines
from jaxlm.data.corpus import Corpus
from jaxlm.data.order import TrainOrder
from jaxlm.data.prepare import prepare
from jaxlm.data.scoring import Scored, eval_batches
from jaxlm.data.store_reader import open_store
from jaxlm.data.stream import TrainStream, train_stream
from jaxlm.data.tokenizers import Tokenizer, load_tokenizer

__all__ = [
    "Corpus",
    "Scored",
    "Tokenizer",
    "TrainOrder",
    "TrainStream",
    "compression_baselines",
    "eval_batches",
    "load_tokenizer",
    "open_store",
    "prepare",
    "train_stream",
]
