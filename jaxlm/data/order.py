"""Which tokens are in batch N: a pure function of the corpus, the configuration and N.

The training tokens are cut into W windows of T inputs, each with the T tokens one further on as targets, so an epoch
holds every target once, but for the fewer than T that are left over. Sample i of the run is window p(i mod W) of epoch
i // W, where p is a keyed permutation that is computed, not stored; a run can therefore go on at any batch at once.
Each epoch starts to cut at another token, one of those left over, and so leaves out others.
"""

from functools import lru_cache

import numpy as np

from jaxlm.config import Config

ROUNDS = 8


def permute(index: np.ndarray, size: int, keys: np.ndarray) -> np.ndarray:
    """Places of `index` (int64, in [0, size)) in a permutation of range(size) that `keys` (uint64 [ROUNDS]) choose.

    A Feistel network permutes the next power of four; what falls outside goes through it again until it is inside
    ("cycle walking", Black and Rogaway 2002), at most four times on average.
    """
    half = np.uint64(max(1, ((size - 1).bit_length() + 1) // 2))
    out = index.astype(np.uint64)
    outside = np.ones(out.shape, bool)
    while outside.any():
        out[outside] = _feistel(out[outside], half, keys)
        outside = out >= size
    return out.astype(np.int64)


def _feistel(x: np.ndarray, half: np.uint64, keys: np.ndarray) -> np.ndarray:
    mask = (np.uint64(1) << half) - np.uint64(1)
    left, right = x >> half, x & mask
    for key in keys:
        left, right = right, left ^ (_mix(right ^ key) & mask)
    return (left << half) | right


def _mix(x: np.ndarray) -> np.ndarray:
    """The finalizer of SplitMix64 (Steele et al. 2014): every input bit reaches every output bit."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


@lru_cache(maxsize=8)
def _epoch_keys(seed: int, epoch: int) -> tuple[np.ndarray, int]:
    state = np.random.SeedSequence([seed % 2**64, epoch]).generate_state(ROUNDS + 1, np.uint64)
    return state[:ROUNDS], int(state[ROUNDS])


def num_windows(num_tokens: int, seq_len: int) -> int:
    """Training samples in an epoch."""
    return (num_tokens - 1) // seq_len


def window_starts(sample: np.ndarray, num_tokens: int, seq_len: int, seed: int) -> np.ndarray:
    """int64 [n]: where the window of each sample of the run (int64 [n], counted from 0) starts among the tokens."""
    windows = num_windows(num_tokens, seq_len)
    spare = num_tokens - 1 - windows * seq_len
    epochs, places = np.divmod(sample, windows)
    starts = np.empty_like(places)
    for epoch in np.unique(epochs):
        keys, drawn = _epoch_keys(seed, int(epoch))
        here = epochs == epoch
        starts[here] = permute(places[here], windows, keys) * seq_len + drawn % (spare + 1)
    return starts


def batch_at(tokens: np.ndarray, config: Config, n: int, rows: slice = slice(None)) -> dict[str, np.ndarray]:
    """Rows of the global batch of update n + 1 (n counts from 0).

    Returns:
      inputs, targets: int32 [R, T].
    """
    sample = np.arange(n * config.batch_size, (n + 1) * config.batch_size, dtype=np.int64)[rows]
    starts = window_starts(sample, len(tokens), config.seq_len, config.seed)
    windows = np.lib.stride_tricks.sliding_window_view(np.asarray(tokens), config.seq_len + 1)[starts]
    return {
        "inputs": windows[:, :-1].astype(np.int32, order="C"),
        "targets": windows[:, 1:].astype(np.int32, order="C"),
    }
