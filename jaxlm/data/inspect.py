"""What the model is shown, taken apart: batches by documents, what of them is learned, and what a corpus is made of.

Numbers only; `jaxlm inspect` shows them. Of a large corpus a sample is counted that is the same each time.
"""

import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from jaxlm.config import Config
from jaxlm.data.corpus import Corpus
from jaxlm.data.order import Packed, Rows, TrainOrder, make_order
from jaxlm.data.sources.documents import Split
from jaxlm.data.tokenizers import Tokenizer
from jaxlm.data.tokens import Tokens

SAMPLE_TOKENS, BLOCK = 10_000_000, 1 << 16  # tokens that are counted at most, so many side by side
SAMPLE_DOCUMENTS = 1_000_000  # whose lengths are looked at, at most
MARKS = "⟨⟩‹›"  # around what is no text, and around what is not learned
PADDING_EDGES = (0.0, 0.01, 0.05, 0.1, 0.25, 0.5, 1.0)  # of the histogram of rows by their share of padding


def visible(data: bytes, lines: bool = True) -> str:
    """Bytes as text that moves no cursor: what is no UTF-8, cannot be printed, or is a mark is written \\x1b, \\u27e8.

    `lines` keeps newlines.
    """
    kept = "\n" if lines else ""
    text = data.decode("utf-8", "backslashreplace")
    fine = (
        c if c in kept or (c.isprintable() and c not in MARKS) else c.encode("unicode_escape").decode() for c in text
    )
    return "".join(fine)


def decoded(ids: list[int], tokenizer: Tokenizer | None, lines: bool = True) -> list[tuple[str, bool]]:
    """What ids stand for, and whether that is text; ids that stand for no text are marks."""
    if tokenizer is None:
        return [(" ".join(map(str, ids)) + " ", True)]
    marks = {i: f"⟨{visible(name.encode())}⟩" for name, i in tokenizer.specials.items()} | {tokenizer.bos_id: "⟨bos⟩"}
    found = []
    for is_text, group in itertools.groupby(ids, lambda i: bool(tokenizer.pieces[i])):
        if is_text:
            found.append((visible(b"".join(tokenizer.pieces[i] for i in group), lines), True))
        else:
            found += [(marks.get(i, f"⟨id {i}⟩"), False) for i in group]
    return found


class DocumentPart(NamedTuple):
    """What a row has of one document."""

    start: int  # its place in the row
    length: int  # places of the row
    opens: bool | None  # whether the document starts here; None: ids without a text do not say
    ids: np.ndarray  # int32 [n]: all that is read, and a last target that is only predicted
    learned: np.ndarray  # bool [n]: whether it is predicted


@dataclasses.dataclass(frozen=True)
class InspectedBatch:
    """Rows [R, T] of one update, or of validation in order."""

    rows: Rows
    filled: np.ndarray  # int64 [R]: the places of a row that are not padding
    sources: np.ndarray | None  # int64 [R]: which of the corpus's shares a row is of; None: no mixture
    bos_id: int | None

    def pieces(self, row: int) -> Iterator[DocumentPart]:
        inputs, targets, filled = self.rows["inputs"][row], self.rows["targets"][row], int(self.filled[row])
        alone = "positions" in self.rows  # packed documents see nothing of each other, nor predict each other
        if not filled:
            return
        if alone:
            starts = np.flatnonzero(self.rows["positions"][row, :filled] == 0)
        else:
            starts = np.union1d(0, [] if self.bos_id is None else np.flatnonzero(inputs[:filled] == self.bos_id))
        for a, b in itertools.pairwise([*map(int, starts), filled]):
            ids, learned = inputs[a:b], targets[a:b] >= 0
            learned = np.concatenate([[not alone and a > 0 and targets[a - 1] >= 0], learned])
            if (alone or b == filled) and learned[-1]:
                ids = np.append(ids, targets[b - 1])
            opens = None if self.bos_id is None else bool(inputs[a] == self.bos_id)
            yield DocumentPart(a, b - a, opens, ids, learned[: len(ids)])

    def counts(self, rows: slice = slice(None)) -> dict[str, Any]:
        """The targets of some rows by what becomes of them, and their (parts of) documents; None where not known."""
        targets, filled = self.rows["targets"][rows], int(self.filled[rows].sum())
        learned, picked = int((targets >= 0).sum()), range(len(self.filled))[rows]
        found = None if self.bos_id is None else sum(1 for row in picked for _ in self.pieces(row))
        return {"rows": len(picked), "targets": targets.size, "learned": learned, "masked": filled - learned,
                "padding": targets.size - filled, "documents": found}  # fmt: skip


class View:
    """The batches of a split, and the rows that they are taken from."""

    def __init__(self, corpus: Corpus, config: Config, split: Split):
        self.corpus, self.config = corpus, config
        self.order = TrainOrder(corpus, config) if split == "train" else None
        if self.order:
            self._mixed = self.order.mixed  # has what no batch says: which source a row is of
            self.parts, self.num_batches = self._mixed.parts, config.steps
            self._weights = [share.weight for share in corpus.shares] or [1.0]
        else:
            self.parts = [make_order(share.val, config) for share in corpus.parts]
            rows = np.array([part.count for part in self.parts])
            self._weights = (rows / rows.sum()).tolist()
            self._ends = np.cumsum(-(-rows // config.batch_size))  # of each source's batches
            self.num_batches = int(self._ends[-1])

    def batch(self, n: int) -> InspectedBatch:
        """That of update n + 1, or the n-th of validation, where the last one of each source may have fewer rows."""
        tokenizer, size, sources = self.corpus.tokenizer, self.config.batch_size, None
        if self.order:
            rows = {name: batches[0] for name, batches in self.order.batches(n, 1).items()}
            filled = self._filled(rows, np.full(size, self.config.seq_len))
            if self.corpus.shares:
                sources = self._mixed.split(np.arange(n * size, (n + 1) * size))[0]
        else:
            k = int(np.searchsorted(self._ends, n, "right"))
            part, first = self.parts[k], (n - int(self._ends[k - 1] if k else 0)) * size
            places = np.arange(first, min(first + size, part.count))
            rows = part.in_order(places)
            filled = self._filled(rows, self._targets(k) - places * self.config.seq_len)
            if self.corpus.shares:
                sources = np.full(len(places), k)
        return InspectedBatch(rows, filled, sources, tokenizer and tokenizer.bos_id)

    def _targets(self, k: int) -> int:
        """The number of targets in a source's validation set, where documents run on."""
        return len(self.corpus.parts[k].val) - 1

    def _filled(self, rows: Rows, left: np.ndarray) -> np.ndarray:
        """int64 [R]: the places of each row that are not padding.

        Args:
          left: int64 [R], the targets from each row on to the end; read where documents run on.
        """
        T = rows["inputs"].shape[1]
        if "positions" not in rows:
            return np.minimum(left, T)
        # What starts at a place, does not go on, and has nothing to learn, is padding.
        stops = np.pad(rows["positions"][:, 1:] == 0, ((0, 0), (0, 1)), constant_values=True)
        return T - ((rows["positions"] == 0) & stops & (rows["targets"] < 0)).sum(1)

    def padding(self) -> tuple[float, np.ndarray]:
        """The share of padding in all places of the split, and the share of its rows (float64 [7]) that have none of
        it, and those up to each further one of PADDING_EDGES. Sources of a mixture count with their weights, in
        validation with their rows.
        """
        total, rows = 0.0, np.zeros(len(PADDING_EDGES))
        for k, weight in enumerate(self._weights):
            empty = self._padding(k)
            total += weight * float(empty.mean())
            bins = np.searchsorted(PADDING_EDGES, empty)
            rows += weight * np.bincount(bins, minlength=len(PADDING_EDGES)) / len(empty)
        return total, rows

    def _padding(self, k: int) -> np.ndarray:
        """float64 [rows]: the padding's share of each row of a source; of rows without any, one stands for all."""
        part, T = self.parts[k], self.config.seq_len
        if isinstance(part, Packed):
            return 1 - np.add.reduceat(part.packing.lengths, part.packing.rows[:-1]) / T
        if self.order:
            return np.zeros(1)
        return np.append(np.zeros(part.count - 1), part.count - self._targets(k) / T)


def mixture_shares(view: View, batch: InspectedBatch, n: int) -> list[dict[str, Any]]:
    """The share of the rows that each source has in batch n, in those up to it, and wanted; epochs of the whole run."""
    if batch.sources is None or view.order is None:
        return []
    found = np.bincount(batch.sources, minlength=len(view.corpus.shares)) / len(batch.sources)
    places = (n + 1) * view.config.batch_size * view.config.seq_len
    so_far, run = view.order.consumed(n + 1), view.order.consumed(view.num_batches)
    return [
        {"source": share.name, "batch": here, "so_far": before.tokens / places, "wanted": share.weight,
         "epochs": whole.epochs}
        for share, here, before, whole in zip(view.corpus.shares, found.tolist(), so_far, run, strict=True)
    ]  # fmt: skip


def spread(total: int, count: int) -> np.ndarray:
    """int64: `count` of the numbers 0 ... total - 1, evenly spaced; all where there are no more."""
    return np.arange(total) if total <= count else np.arange(count) * total // count


def _blocks(tokens: Tokens) -> Iterator[np.ndarray]:
    """All tokens, or blocks of them that are evenly spaced, SAMPLE_TOKENS at most."""
    for block in spread(-(-len(tokens) // BLOCK), max(1, SAMPLE_TOKENS // BLOCK)).tolist():
        yield from map(np.asarray, tokens.parts(block * BLOCK, (block + 1) * BLOCK))


def token_counts(tokens: Tokens, vocab_size: int) -> np.ndarray:
    """int64 [vocab_size]: how often each id is in the sample."""
    counts = np.zeros(vocab_size, np.int64)
    for block in _blocks(tokens):
        counts += np.bincount(block.astype(np.int64), minlength=vocab_size)
    return counts


def learned_share(tokens: Tokens) -> float:
    """Of the tokens in the sample."""
    if tokens.masks is None:
        return 1.0
    return float(np.concatenate([*_blocks(Tokens(tokens.masks))]).mean())


class Documents(NamedTuple):
    lengths: np.ndarray  # int64 [n], in tokens with bos
    total: int | None  # documents there are; None: not counted, these are the first

    def summary(self, seq_len: int) -> dict[str, Any]:
        """As JSON."""
        lengths = self.lengths
        return {"total": self.total, "counted": len(lengths), "mean": float(lengths.mean()),
                "median": float(np.median(lengths)), "min": int(lengths.min()), "max": int(lengths.max()),
                "longer_than_seq_len": float((lengths > seq_len).mean())}  # fmt: skip


def documents(corpus: Corpus, split: Split) -> Documents | None:
    """Lengths of the documents of a split, or of some that are evenly spaced; None where nobody knows them."""
    tokens: Tokens = getattr(corpus, split)
    if corpus.tokenizer is None:
        return None
    if "documents" not in corpus.facts[split] and len(tokens) > SAMPLE_TOKENS:
        # Of files of bare tokens nobody knows where documents start but who reads all of them.
        begin = np.concatenate(tokens.parts(0, SAMPLE_TOKENS))
        starts = np.union1d(0, np.flatnonzero(begin == corpus.tokenizer.bos_id))
        lengths = np.diff(starts)  # without the last, which is cut
        return Documents(lengths, None) if len(lengths) else None
    starts = tokens.starts
    if starts is None or not len(starts):
        return None
    picked = spread(len(starts), SAMPLE_DOCUMENTS)
    ends = np.append(starts, len(tokens))[picked + 1]
    return Documents(ends - starts[picked], len(starts))
