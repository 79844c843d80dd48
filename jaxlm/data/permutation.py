"""Keyed permutations that are computed, not stored: which of `count` items is sample i of a run.

Each epoch has a permutation of its own, so any sample of any epoch is found at once.
"""

from functools import lru_cache

import numpy as np

ROUNDS = 8
CHUNK = 2048  # samples that are shuffled and cached together


def permute(index: np.ndarray, size: int, keys: np.ndarray) -> np.ndarray:
    """Maps `index` (int64, in [0, size)) through the permutation of range(size) that `keys` (uint64 [ROUNDS]) select.

    A Feistel network permutes range(P), where P is the next power of four. A result that is not below `size` goes
    through the network again until it is ("cycle walking", Black and Rogaway 2002), at most four times on average.
    """
    half = np.uint64(max(1, ((size - 1).bit_length() + 1) // 2))
    out = index.astype(np.uint64)
    outside = np.ones(out.shape, bool)
    while outside.any():
        out[outside] = _feistel(out[outside], half, keys)
        outside = out >= size
    return out.astype(np.int64)


def _feistel(x: np.ndarray, half: np.uint64, keys: np.ndarray) -> np.ndarray:
    """Permutes the numbers of 2 * half bits with a balanced Feistel network, one round per key."""
    mask = (np.uint64(1) << half) - np.uint64(1)
    left, right = x >> half, x & mask
    for key in keys:
        left, right = right, left ^ (_mix(right ^ key) & mask)
    return (left << half) | right


def _mix(x: np.ndarray) -> np.ndarray:
    """Applies the finalizer of SplitMix64 (Steele et al. 2014): every input bit affects every output bit."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


@lru_cache(maxsize=64)
def _epoch_keys(seed: int, epoch: int) -> tuple[np.ndarray, int]:
    """Returns the permutation keys (uint64 [ROUNDS]) and a random 64-bit number of an epoch."""
    state = np.random.SeedSequence([seed % 2**64, epoch]).generate_state(ROUNDS + 1, np.uint64)
    return state[:ROUNDS], int(state[ROUNDS])


@lru_cache(maxsize=64)
def _shuffled_chunk(chunk: int, count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Computes `shuffled` for the samples chunk * CHUNK ... (chunk + 1) * CHUNK - 1."""
    sample = np.arange(chunk * CHUNK, (chunk + 1) * CHUNK, dtype=np.int64)
    epochs, places = np.divmod(sample, count)
    found, drawn = np.empty_like(places), np.empty(len(places), np.uint64)
    for epoch in np.unique(epochs):
        keys, number = _epoch_keys(seed, int(epoch))
        here = epochs == epoch
        found[here], drawn[here] = permute(places[here], count, keys), number
    return found, drawn


def shuffled(sample: np.ndarray, count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Maps samples of the run (int64 [n], counted from 0) to items (int64 [n], below `count`). Also returns the random
    number of each sample's epoch (uint64 [n]).

    Whole chunks of samples are computed and cached, so one sample costs as much as CHUNK of them.
    """
    found, drawn = np.empty(len(sample), np.int64), np.empty(len(sample), np.uint64)
    chunks = sample // CHUNK
    for chunk in np.unique(chunks):
        here = chunks == chunk
        places = sample[here] - chunk * CHUNK
        whole = _shuffled_chunk(int(chunk), count, seed)
        found[here], drawn[here] = whole[0][places], whole[1][places]
    return found, drawn
