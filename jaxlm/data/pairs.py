"""Rows for an encoder and a decoder: whole pairs of a prompt and its answer, side by side.

A pair is a document of the token store, whose first ids are not trained on. Its prompt, opened by bos, is in a row of S
tokens for the encoder, and its answer, also opened by bos and ended by the bos of the next document, in a row of T
tokens for the decoder. Neither sees other pairs. A longer prompt or answer is cut where its row ends.

A pair needs as much of a row as the larger of prompt / S and answer / T. So a pair has one length, and packing.py can
pack it.
"""

from typing import NamedTuple

import numpy as np

from jaxlm.data.packing import best_fit, in_rows
from jaxlm.data.permutation import shuffled
from jaxlm.data.tokens import Tokens


class Pairs(NamedTuple):
    """The pairs of a corpus, row by row."""

    starts: np.ndarray  # int64 [pairs]: token index of each prompt's bos
    answers: np.ndarray  # int64 [pairs]: of each answer's first token
    stops: np.ndarray  # int64 [pairs]: of the next document's bos
    rows: np.ndarray  # int64 [rows + 1]: row r has the pairs rows[r] ... rows[r + 1] - 1


def answers_of(tokens: Tokens) -> np.ndarray:
    """For each document, the index of its first learned token behind its bos; its end if there is none.

    For instance, a document at 10 with a prompt of two tokens has ids at 10 (bos), 11, 12 (prompt), and 13: the answer.
    """
    assert tokens.starts is not None and tokens.masks is not None
    found, shard_starts = np.append(tokens.starts[1:], len(tokens)), 0
    for mask in tokens.masks:  # no document is in two shards
        learned = np.append(shard_starts + np.flatnonzero(np.asarray(mask)), len(tokens))
        shard_stops = shard_starts + len(mask)
        here = slice(*np.searchsorted(tokens.starts, (shard_starts, shard_stops)))
        found[here] = np.minimum(found[here], learned[np.searchsorted(learned, tokens.starts[here] + 1)])
        shard_starts = shard_stops
    return found


def lengths_of(pairs: Pairs) -> tuple[np.ndarray, np.ndarray]:
    """Tokens of each prompt and of each answer, with the bos that opens both."""
    return pairs.answers - pairs.starts, pairs.stops - pairs.answers + 1


def pack_pairs(tokens: Tokens, S: int, T: int) -> Pairs:
    """The pairs of a corpus in rows of S and T tokens; caches them in `tokens.packings`."""
    if (S, T) not in tokens.packings:
        assert tokens.starts is not None
        stops = np.append(tokens.starts[1:], len(tokens))
        pairs = Pairs(tokens.starts, answers_of(tokens), stops, np.arange(0))
        prompts, answers = lengths_of(pairs)
        size = max(S, T)
        # Each pair's part of a row, in units of 1 / size, rounded up.
        shares = np.maximum(-(-np.minimum(prompts, S) * size // S), -(-np.minimum(answers, T) * size // T))
        order, rows = in_rows(best_fit(shares, size))
        tokens.packings[S, T] = Pairs(pairs.starts[order], pairs.answers[order], pairs.stops[order], rows)
    return tokens.packings[S, T]


class PackedPairs:
    """Rows of pairs: `prompts` and `prompt_positions` [R, S], `inputs`, `targets` and `positions` [R, T]."""

    def __init__(self, tokens: Tokens, S: int, T: int, seed: int):
        self.tokens, self.S, self.T, self.seed = tokens, S, T, seed
        self.pairs = pack_pairs(tokens, S, T)
        self.rows_per_epoch = self.num_eval_rows = len(self.pairs.rows) - 1

    def filled(self) -> np.ndarray:
        """Returns the number of places in each of the decoder's rows that are not padding, int64 [rows]."""
        return np.add.reduceat(np.minimum(lengths_of(self.pairs)[1], self.T), self.pairs.rows[:-1])

    def rows(self, sample: np.ndarray) -> dict[str, np.ndarray]:
        return self.eval_rows(shuffled(sample, self.num_eval_rows, self.seed)[0])

    def eval_rows(self, places: np.ndarray) -> dict[str, np.ndarray]:
        lengths = {"prompts": self.S, "prompt_positions": self.S, "inputs": self.T, "targets": self.T}
        out = {name: np.zeros((len(places), n), np.int32) for name, n in (lengths | {"positions": self.T}).items()}
        out["targets"][:] = -1
        for r, place in enumerate(places[places < self.num_eval_rows].tolist()):
            self._fill({name: rows[r] for name, rows in out.items()}, place)
        return out

    def _fill(self, row: dict[str, np.ndarray], place: int) -> None:
        of_prompt = of_answer = 0
        for pair in range(self.pairs.rows[place], self.pairs.rows[place + 1]):
            start, answer, stop = (int(x[pair]) for x in self.pairs[:3])
            n, m = min(answer - start, self.S), min(stop - answer + 1, self.T)
            prompt, reply = slice(of_prompt, of_prompt + n), slice(of_answer, of_answer + m)
            row["prompts"][prompt] = self.tokens.span(start, start + n)
            row["prompt_positions"][prompt] = np.arange(n)
            self.tokens.copy(answer - 1, row["inputs"][reply], row["targets"][reply])
            row["inputs"][of_answer] = row["prompts"][of_prompt]  # bos
            row["positions"][reply] = np.arange(m)
            of_prompt, of_answer = of_prompt + n, of_answer + m
