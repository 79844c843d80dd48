"""Reads token ids in many files as one array."""

import bisect
import itertools
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import numpy as np

from jaxlm.data.token_file import Shard, TokenFile


class Tokens:
    """Token ids [num_tokens], unsigned integers: the concatenation of shards."""

    def __init__(
        self,
        shards: Sequence[Shard],
        masks: Sequence[Shard] | None = None,
        starts: Callable[[], np.ndarray] | None = None,
        end: int = -1,
    ):
        """
        Args:
          shards: ids [n] each, all of the same dtype.
          masks: bool [n] each, whether an id counts towards the loss as a target; None if all do.
          starts: returns the index of each document's bos, int64 [documents]; None if unknown.
          end: the id that ends the last document, a bos; -1 for none.
        """
        self.end = end
        self.packings: dict[Any, Any] = {}  # cached packings of these tokens (packing.py by T, pairs.py by S and T)
        self.shards = [shard for shard in shards if shard.size]
        self.masks = None if masks is None else [mask for mask in masks if mask.size]
        self._starts = starts
        self.dtype = self.shards[0].dtype if self.shards else np.dtype("<u2")
        self._ends = [0, *itertools.accumulate(map(len, self.shards))]

    def __len__(self) -> int:
        return self._ends[-1]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        arrays = [np.asarray(shard) for shard in self.shards]
        whole = arrays[0] if len(arrays) == 1 else np.concatenate([*arrays, np.empty(0, self.dtype)])
        return whole.astype(dtype or self.dtype, copy=bool(copy))

    @cached_property
    def starts(self) -> np.ndarray | None:
        """The index of each document's bos, int64 [documents]; None if unknown."""
        return None if self._starts is None else self._starts()

    def windows(self, starts: np.ndarray, length: int) -> np.ndarray:
        """Returns `length` ids from each of `starts` (int64 [n]) on: int32 [n, length]."""
        return self._gather(self.shards, starts, length, np.dtype(np.int32))

    def span(self, start: int, stop: int) -> np.ndarray:
        """Returns the ids start ... stop - 1, int32."""
        return self.windows(np.array([start]), stop - start)[0]

    def targets(self, starts: np.ndarray, length: int) -> np.ndarray:
        """Returns the same as `windows`, with -1 for each id that does not count towards the loss."""
        ids = self.windows(starts, length)
        if self.masks is not None:
            ids[~self._gather(self.masks, starts, length, np.dtype(bool))] = -1
        return ids

    def copy(self, start: int, inputs: np.ndarray, targets: np.ndarray) -> None:
        """Fills inputs [n] with the ids from `start` on, and targets [n] with the ids from `start` + 1 on.

        A target that does not count towards the loss is -1. The target of the very last id is `end`.
        """
        n = len(inputs)
        ids = self._read(self.shards, start, n + 1)
        inputs[:] = ids[:n]
        targets[: len(ids) - 1] = ids[1:]
        if len(ids) == n:
            targets[-1] = self.end
        if self.masks is not None:
            learned = self._read(self.masks, start, n + 1)[1:]
            targets[: len(learned)][~learned] = -1

    def parts(self, start: int, stop: int) -> list[Shard]:
        """Returns the ids start ... stop - 1 as parts of shards, which are not read yet."""
        spans = zip(self.shards, self._ends, strict=False)
        return [shard[max(start - at, 0) : max(stop - at, 0)] for shard, at in spans if start - at < len(shard)]

    def _gather(self, shards: list[Shard], starts: np.ndarray, length: int, dtype: np.dtype) -> np.ndarray:
        """Returns `length` values from each of `starts` on: [n, length] of `dtype`."""
        if len(shards) == 1 and isinstance(shards[0], np.ndarray):
            return np.lib.stride_tricks.sliding_window_view(shards[0], length)[starts].astype(dtype, order="C")
        out = np.empty((len(starts), length), dtype)
        for row, start in zip(out, starts.tolist(), strict=True):
            row[:] = self._read(shards, start, length)
        return out

    def _read(self, shards: list[Shard], start: int, length: int) -> np.ndarray:
        """Returns `length` values from `start` on, fewer at the end; a view if they lie in one array."""
        first = bisect.bisect_right(self._ends, start) - 1
        start -= self._ends[first]
        part = _slice(shards[first], start, start + length)
        if len(part) == length:
            return part
        parts = [part]
        while length > sum(map(len, parts)) and first + 1 < len(shards):
            first += 1
            parts.append(_slice(shards[first], 0, length - sum(map(len, parts))))
        return np.concatenate(parts)


def _slice(shard: Shard, start: int, stop: int) -> np.ndarray:
    """Returns a part of a shard; reads it if the shard is a file."""
    return shard.read(start, stop) if isinstance(shard, TokenFile) else shard[start:stop]


def chain(parts: Sequence[Tokens]) -> Tokens:
    """Concatenates tokens."""
    masks = None
    if any(part.masks is not None for part in parts):
        masks = [m for p in parts for m in (p.masks or [np.ones(len(shard), bool) for shard in p.shards])]

    def starts() -> np.ndarray:
        offsets = np.cumsum([0, *map(len, parts)])
        places = zip(parts, offsets, strict=False)
        return np.concatenate([own + offset for part, offset in places if (own := part.starts) is not None])

    known = all(part._starts is not None for part in parts)
    return Tokens([shard for part in parts for shard in part.shards], masks, starts if known else None, parts[-1].end)
