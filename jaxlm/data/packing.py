"""Best-fit packing: whole documents side by side in rows of T tokens, with little left empty.

A document of n tokens, its bos among them, fills n places: each of its tokens is an input, and the target of the last
is the bos that ends it. A longer one than T is cut into pieces of T and a rest. Pieces go, the longest first, where the
smallest space that is large enough is left (best-fit decreasing; Ding et al. 2024, Fewer Truncations Improve Language
Modeling). Lengths are at most T, so all of one length that find the same space are placed at once.
"""

import bisect
from typing import NamedTuple

import numpy as np

from jaxlm.data.tokens import Tokens


class Packing(NamedTuple):
    """Pieces of documents, row by row."""

    starts: np.ndarray  # int64 [pieces], among the tokens
    lengths: np.ndarray  # int32 [pieces]
    rows: np.ndarray  # int64 [rows + 1]: row r has the pieces rows[r] ... rows[r + 1] - 1


def pieces(document_starts: np.ndarray, num_tokens: int, T: int) -> tuple[np.ndarray, np.ndarray]:
    """Starts (int64) and lengths (int32) of the pieces of at most T tokens that documents are cut into."""
    lengths = np.diff(document_starts, append=num_tokens)
    counts = -(-lengths // T)
    within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)  # 0, 1, ... of each document
    starts = np.repeat(document_starts, counts) + within * T
    ends = np.repeat(document_starts + lengths, counts)
    return starts, np.minimum(ends - starts, T).astype(np.int32)


def best_fit(lengths: np.ndarray, T: int) -> np.ndarray:
    """int64 [n]: the row of each piece of 1 to T tokens. Rows are numbered in the order in which they are opened."""
    order = np.argsort(-lengths, kind="stable")  # the longest first
    counts = np.bincount(lengths, minlength=T + 1)
    row_of = np.empty(len(lengths), np.int64)
    left: dict[int, list[np.ndarray]] = {}  # space -> rows that have so much left
    sizes: list[int] = []  # its keys, in order
    done = num_rows = 0

    def leave(space: int, rows: np.ndarray) -> None:
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
            each = space // length  # a row with pieces of this length has the smallest space until it is full
            needed = -(-len(todo) // each)
            if at < len(sizes):
                rows = left[space].pop()
                leave_alone, rows = rows[needed:], rows[:needed]
                if len(leave_alone):
                    left[space].append(leave_alone)
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
    """The packing of all documents of a corpus, whose `starts` are known; rows in the order of their first pieces, so
    that some of them are no other than the rest.
    """
    if T in tokens.packings:
        return tokens.packings[T]
    assert tokens.starts is not None
    starts, lengths = pieces(tokens.starts, len(tokens), T)
    row_of = best_fit(lengths, T)
    first = np.unique(row_of, return_index=True)[1]  # of each row's pieces
    row_of = np.argsort(np.argsort(first))[row_of]
    order = np.argsort(row_of, kind="stable")
    rows = np.searchsorted(row_of[order], np.arange(row_of.max(initial=-1) + 2))
    tokens.packings[T] = Packing(starts[order], lengths[order], rows)
    return tokens.packings[T]
