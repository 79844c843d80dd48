"""Decides which tokens are in batch N: a pure function of the corpus, the configuration, N, and the order's version.

The training tokens are cut into W windows of T inputs; the targets are the T tokens shifted by one. Sample i of the run
is window p(i mod W) of epoch i // W. The permutation p of each epoch is computed, not stored, so a run can resume at
any batch at once. An epoch holds every target once, except for T - 1 to 2 T - 2 left-over targets (fewer if the corpus
has fewer than 2 T tokens). They let each epoch start cutting at a different token, and so use different windows. With
packed documents, the rows of the packing take the place of the windows. In a mixture, each source has its own order.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol, assert_never

import numpy as np

from jaxlm.config import Config
from jaxlm.data.corpus import Corpus
from jaxlm.data.packing import pack
from jaxlm.data.pairs import PackedPairs
from jaxlm.data.permutation import shuffled
from jaxlm.data.tokens import Tokens

WEIGHT_BITS = 32  # fractional bits of a mixture's weights (fixed point)
# A run keeps the version it began with. Version 1 leaves fewer than T targets over; if it leaves none, all epochs have
# the same windows. Version 2 leaves T - 1 or more over, if the corpus has at least 2 T tokens.
VERSION, VERSIONS = 2, (1, 2)

# inputs, targets (-1 does not count towards the loss) and, with packed documents, positions: int32 [R, T]; for an
# encoder, prompts and prompt_positions: int32 [R, S].
Rows = dict[str, np.ndarray]


def num_windows(num_tokens: int, seq_len: int, version: int = VERSION) -> int:
    """Returns the number of training samples in an epoch."""
    return (num_tokens - 1) // seq_len if version == 1 else max(1, (num_tokens - seq_len) // seq_len)


def window_starts(sample: np.ndarray, num_tokens: int, seq_len: int, seed: int, version: int = VERSION) -> np.ndarray:
    """Returns the token index (int64 [n]) at which the window of each sample (int64 [n], counted from 0) starts.

    For instance, 10 tokens and T = 3 give 2 windows and 3 spare targets: the windows of an epoch start at k and k + 3,
    in shuffled order, with a k from 0 to 3.
    """
    windows = num_windows(num_tokens, seq_len, version)
    spare = num_tokens - 1 - windows * seq_len
    places, drawn = shuffled(sample, windows, seed)
    return places * seq_len + (drawn % np.uint64(spare + 1)).astype(np.int64)


class Order(Protocol):
    """Gives the rows of training, shuffled, and the rows of an evaluation, in the order of the corpus."""

    rows_per_epoch: int  # rows in an epoch of training
    num_eval_rows: int  # rows in an evaluation of all targets

    def rows(self, sample: np.ndarray) -> Rows:
        """Returns the training rows of some samples of the run (int64 [R], counted from 0)."""
        ...

    def eval_rows(self, places: np.ndarray) -> Rows:
        """Returns the evaluation rows at `places` (int64 [R], rising).

        Rows 0 ... num_eval_rows - 1 hold every target once. All targets of later rows are -1.
        """
        ...


class Windows:
    """Rows cut from the concatenated documents."""

    def __init__(self, tokens: Tokens, T: int, seed: int, version: int = VERSION):
        self.tokens, self.T, self.seed, self.version = tokens, T, seed, version
        self.rows_per_epoch, self.num_eval_rows = num_windows(len(tokens), T, version), -(-(len(tokens) - 1) // T)

    def rows(self, sample: np.ndarray) -> Rows:
        return self._at(window_starts(sample, len(self.tokens), self.T, self.seed, self.version))

    def _at(self, starts: np.ndarray) -> Rows:
        if self.tokens.masks is None:  # one read gives inputs and targets
            ids = self.tokens.windows(starts, self.T + 1)
            return {"inputs": ids[:, :-1].copy(), "targets": ids[:, 1:].copy()}
        return {"inputs": self.tokens.windows(starts, self.T), "targets": self.tokens.targets(starts + 1, self.T)}

    def eval_rows(self, places: np.ndarray) -> Rows:
        out = _empty(len(places), self.T)
        whole, rest = divmod(len(self.tokens) - 1, self.T)
        full = int(np.searchsorted(places, whole))
        if full:
            for name, found in self._at(places[:full] * self.T).items():
                out[name][:full] = found
        if rest and full < len(places) and places[full] == whole:  # the last row is only partly filled
            start = np.array([whole * self.T])
            out["inputs"][full, :rest] = self.tokens.windows(start, rest)[0]
            out["targets"][full, :rest] = self.tokens.targets(start + 1, rest)[0]
        return out


class Packed:
    """Rows of whole documents. Each document attends only to itself, and its `positions` start at 0."""

    def __init__(self, tokens: Tokens, T: int, seed: int):
        self.tokens, self.T, self.seed = tokens, T, seed
        self.packing = pack(tokens, T)
        self.rows_per_epoch = self.num_eval_rows = len(self.packing.rows) - 1
        self._places = np.arange(T, dtype=np.int32)

    def filled(self) -> np.ndarray:
        """Returns the number of places in each row that are not padding, int64 [rows]."""
        return np.add.reduceat(self.packing.lengths, self.packing.rows[:-1])

    def rows(self, sample: np.ndarray) -> Rows:
        return self.eval_rows(shuffled(sample, self.num_eval_rows, self.seed)[0])

    def eval_rows(self, places: np.ndarray) -> Rows:
        out = _empty(len(places), self.T) | {"positions": np.zeros((len(places), self.T), np.int32)}
        starts, lengths, rows = self.packing
        for r, place in enumerate(places[places < self.num_eval_rows].tolist()):
            at = 0
            for piece in range(rows[place], rows[place + 1]):
                start, n = int(starts[piece]), int(lengths[piece])
                self.tokens.copy(start, out["inputs"][r, at : at + n], out["targets"][r, at : at + n])
                out["positions"][r, at : at + n] = self._places[:n]
                at += n
        return out


def _empty(num_rows: int, T: int) -> Rows:
    """Returns rows of padding."""
    return {"inputs": np.zeros((num_rows, T), np.int32), "targets": np.full((num_rows, T), -1, np.int32)}


class Mixed:
    """An order that draws each sample from one of several sources.

    After any number of samples, the count of each source differs from its share by less than the number of sources.
    Over random seeds, the probability that a sample comes from a source is the weight of that source.

    For instance, with weights 1/2, 1/4, 1/4 and phases of 0, source 0 takes samples 1, 3, 5, 7, ...; source 1 takes
    every second one of the others, 2, 6, ...; and source 2 takes the rest, 0, 4, ...
    """

    def __init__(self, parts: Sequence[Order], weights: list[float], seed: int):
        self.parts = parts
        # Source k takes its share of the samples that sources 0 ... k - 1 leave.
        left = np.cumsum(weights[::-1])[::-1]
        self._shares = [max(1, round(w / rest * 2**WEIGHT_BITS)) for w, rest in zip(weights, left, strict=True)]
        # No run reaches epoch 2**64 - 1, so these random numbers are independent of every epoch's keys.
        self._phases = np.random.SeedSequence([seed % 2**64, 2**64 - 1]).generate_state(len(parts)).tolist()

    def counts_before(self, sample: int) -> list[int]:
        """Returns how many of the samples 0 ... sample - 1 come from each source."""
        counts = []
        for share, phase in zip(self._shares, self._phases, strict=True):
            counts.append(int(_share_of(np.int64(sample), share, phase)))
            sample -= counts[-1]
        return counts

    def source_and_index(self, sample: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns the source of each sample, and how many earlier samples came from that source."""
        source = np.full(len(sample), -1)
        place = sample.copy()  # index among the samples that the previous sources leave
        for k, (share, phase) in enumerate(zip(self._shares, self._phases, strict=True)):
            left = source < 0
            before = _share_of(place, share, phase)
            taken = left & (_share_of(place + 1, share, phase) > before)
            source[taken] = k
            place = np.where(taken, before, np.where(left, place - before, place))
        return source, place

    def rows(self, sample: np.ndarray) -> Rows:
        if len(self.parts) == 1:
            return self.parts[0].rows(sample)
        source, place = self.source_and_index(sample)
        out: Rows = {}
        for k in np.unique(source):
            for name, found in self.parts[k].rows(place[source == k]).items():
                out.setdefault(name, np.empty((len(sample), found.shape[1]), np.int32))[source == k] = found
        return out


def _share_of(number: np.ndarray | np.int64, share: int, phase: int) -> Any:
    """Returns floor((number * share + phase) / 2^32), without overflow for numbers below 2^50."""
    high, low = (number >> 20) * share, (number & 0xFFFFF) * share
    return (high >> 12) + ((((high & 0xFFF) << 20) + low + phase) >> WEIGHT_BITS)


def make_order(tokens: Tokens, config: Config, number: int = 0, version: int = VERSION) -> Order:
    """Returns the order of one source.

    Args:
      number: index of the source in a mixture; each source is shuffled with its own seed. Inserting or reordering
        sources therefore reshuffles all later ones.
      version: one of VERSIONS; packed documents and pairs have only one.
    """
    seed = config.seed + number * 2**32  # config.seed is below 2**32
    if config.model.encoder_layers:
        return PackedPairs(tokens, config.model.encoder_len, config.seq_len, seed)
    match config.data.packing:
        case "document":
            return Packed(tokens, config.seq_len, seed)
        case "concat":
            return Windows(tokens, config.seq_len, seed, version)
        case other:
            assert_never(other)


class SourceProgress(NamedTuple):
    """How much of a source a run has trained on."""

    name: str
    tokens: int
    epochs: float


def _merged(ranges: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Returns the union of ranges (first, last) as ranges that rise and do not overlap."""
    found: list[tuple[int, int]] = []
    for first, last in sorted(ranges):
        if found and first <= found[-1][1]:
            first, last = found[-1][0], max(found.pop()[1], last)
        found.append((first, last))
    return found


class TrainOrder:
    """The order of a run's training rows, over all sources.

    Args:
      left_out: ranges (first, last), both included, of batches to skip; batches are counted from 1.
      version: one of VERSIONS.
    """

    def __init__(
        self, corpus: Corpus, config: Config, left_out: Sequence[tuple[int, int]] = (), version: int = VERSION
    ):
        shares, self.version = corpus.parts, version
        self._names = [share.name for share in shares]
        self.mixed = Mixed(
            [make_order(share.train, config, i, version) for i, share in enumerate(shares)],
            [share.weight for share in shares],
            config.seed,
        )
        self._T, self._batch_size = config.seq_len, config.batch_size
        ranges = _merged(left_out)
        counts = np.cumsum([0, *(last - first + 1 for first, last in ranges)])
        # _trained_before[k]: batches trained on before range k; _left_out[k]: batches in ranges 0 ... k - 1.
        self._trained_before = np.array([first - 1 for first, _ in ranges], np.int64) - counts[:-1]
        self._left_out = counts.astype(np.int64)

    def batch_number(self, step: np.ndarray | int) -> Any:
        """Returns the number of the batch that a step trains on, both counted from 1.

        They are equal if no batch is left out. With batches 3 and 4 left out, steps 1, 2, 3, 4 train on 1, 2, 5, 6.
        """
        return step + self._left_out[np.searchsorted(self._trained_before, np.asarray(step) - 1, side="right")]

    def batches(self, first: int, count: int, rows: slice = slice(None)) -> Rows:
        """Returns the rows [count, R, T] of the batches of steps first + 1 ... first + count (counted from 1).

        Args:
          rows: which rows of each global batch.
        """
        n = self.batch_number(np.arange(first + 1, first + count + 1, dtype=np.int64))[:, None] - 1
        sample = n * self._batch_size + np.arange(self._batch_size)[rows]
        return {k: v.reshape(*sample.shape, -1) for k, v in self.mixed.rows(sample.reshape(-1)).items()}

    def consumed(self, steps: int) -> list[SourceProgress]:
        """Returns the tokens and epochs of each source after `steps` updates. Without a mixture, one is named ""."""
        taken = self.mixed.counts_before(int(self.batch_number(steps)) * self._batch_size if steps else 0)
        parts = zip(self._names, taken, self.mixed.parts, strict=True)
        return [SourceProgress(name, count * self._T, count / part.rows_per_epoch) for name, count, part in parts]
