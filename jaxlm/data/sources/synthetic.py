"""The source `synthetic`: generated token ids whose best possible loss is known."""

import numpy as np

from jaxlm.config import Config
from jaxlm.data.corpus import Corpus
from jaxlm.data.sources.ids import corpus_of

TRAIN, VAL = 1 << 20, 1 << 15  # tokens


def open_synthetic(config: Config, progress: bool) -> Corpus:
    """A corpus of x[t+1] = (5 x[t] + 1 + noise) mod vocab_size, with noise drawn uniformly from {0, 1, 2, 3}.

    The best possible loss is ln 4 = 1.386 nats. The ids depend only on `seed` and `data.vocab_size`.
    """
    vocab_size = config.data.vocab_size
    train = [_chains(vocab_size, TRAIN, seed=[config.seed % 2**64, 0])]
    val = [_chains(vocab_size, VAL, seed=[config.seed % 2**64, 1])]
    return corpus_of(config, vocab_size, train, val, None)


def _chains(vocab_size: int, num_tokens: int, seed: list[int], length: int = 4096) -> np.ndarray:
    """uint32 [num_tokens]: chains of `length` tokens, computed side by side and then concatenated."""
    rng = np.random.default_rng(seed)
    x = np.empty((length, num_tokens // length), np.uint32)
    x[0] = rng.integers(vocab_size, size=x.shape[1])
    noise = rng.integers(4, size=x.shape, dtype=np.uint32)
    for t in range(1, length):
        x[t] = (5 * x[t - 1].astype(np.uint64) + 1 + noise[t]) % vocab_size
    return np.ascontiguousarray(x.T).reshape(-1)
