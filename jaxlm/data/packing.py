"""Best-fit packing: places whole documents side by side in rows of T tokens and leaves little padding.

A document of n tokens, bos included, fills n places: each token is an input, and the target of the last token is the
bos that ends the document. A document longer than T is cut into pieces of T tokens and a rest. The longest pieces are
placed first, each in the row with the least space that still fits it (best-fit decreasing; Ding et al. 2024, Fewer
Truncations Improve Language Modeling). There are at most T lengths, so all pieces of one length that go into rows with
the same space are placed at once.
"""

import bisect
from typing import NamedTuple

import numpy as np

from jaxlm.data.tokens import Tokens


class Packing(NamedTuple):
    """The pieces of documents, row by row."""

    starts: np.ndarray  # int64 [pieces]: token index of each piece's first token
    lengths: np.ndarray  # int32 [pieces]: tokens of each piece
    rows: np.ndarray  # int64 [rows + 1]: row r has the pieces rows[r] ... rows[r + 1] - 1


def pieces(document_starts: np.ndarray, num_tokens: int, T: int) -> tuple[np.ndarray, np.ndarray]:
    """Cuts documents into pieces of at most T tokens; returns their starts (int64) and lengths (int32)."""
    lengths = np.diff(document_starts, append=num_tokens)
    counts = -(-lengths // T)
    within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)  # 0, 1, ... in each document
    starts = np.repeat(document_starts, counts) + within * T
    ends = np.repeat(document_starts + lengths, counts)
    return starts, np.minimum(ends - starts, T).astype(np.int32)


def best_fit(lengths: np.ndarray, T: int) -> np.ndarray:
    """Returns the row (int64 [n]) of each piece of 1 to T tokens. Rows are numbered in the order they are opened."""
    order = np.argsort(-lengths, kind="stable")  # the longest first
    counts = np.bincount(lengths, minlength=T + 1)
    row_of = np.empty(len(lengths), np.int64)
    left: dict[int, list[np.ndarray]] = {}  # space -> rows with that much space left
    sizes: list[int] = []  # the keys of `left`, rising
    done = num_rows = 0

    def leave(space: int, rows: np.ndarray) -> None:
        """Records the space left in some rows."""
        if space and len(rows):
            if space not in left:
                bisect.insort(sizes, space)
            left.setdefault(space, []).append(rows)

    for length in range(T, 0, -1):
        todo = order[done : done + counts[length]]
        done += counts[length]
        while len(todo):
            at = bisect.bisect_left(sizes, length)
            space = sizes[at] if at < len(sizes) else T
            each = space // length  # best fit puts so many into one row before it turns to another
            needed = -(-len(todo) // each)
            if at < len(sizes):
                rows = left[space].pop()
                unused, rows = rows[needed:], rows[:needed]
                if len(unused):
                    left[space].append(unused)
                elif not left[space]:
                    del left[space], sizes[at]
            else:
                rows = np.arange(num_rows, num_rows + needed)
                num_rows += needed
            placed = min(len(todo), each * len(rows))
            row_of[todo[:placed]] = np.repeat(rows, each)[:placed]
            todo = todo[placed:]
            full = placed // each
            leave(space - each * length, rows[:full])
            leave(space - (placed - full * each) * length, rows[full:])
    return row_of


def pack(tokens: Tokens, T: int) -> Packing:
    """Returns the packing of all documents of a corpus, which must know its `starts`. `tokens.packings` keeps it."""
    if T in tokens.packings:
        return tokens.packings[T]
    assert tokens.starts is not None
    starts, lengths = pieces(tokens.starts, len(tokens), T)
    order, rows = in_rows(best_fit(lengths, T))
    tokens.packings[T] = Packing(starts[order], lengths[order], rows)
    return tokens.packings[T]


def in_rows(row_of: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the pieces row by row, and where in them each row begins, and the last one ends.

    Rows are ordered by their first piece in the corpus, not by lengths, so that a part of the rows represents them all.
    """
    first = np.unique(row_of, return_index=True)[1]  # the first piece of each row
    row_of = np.argsort(np.argsort(first))[row_of]
    order = np.argsort(row_of, kind="stable")
    return order, np.searchsorted(row_of[order], np.arange(row_of.max(initial=-1) + 2))
