"""Analyzes what the model sees: the documents in a batch, which targets count towards the loss, and corpus statistics.

This module computes numbers; `jaxlm inspect` shows them. Statistics of a large corpus come from a sample, which is the
same each time. "Learned" ids are those that count towards the loss as targets.
"""

import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from jaxlm.config import Config
from jaxlm.data.corpus import Corpus
from jaxlm.data.order import Packed, Rows, TrainOrder, make_order
from jaxlm.data.pairs import PackedPairs, lengths_of
from jaxlm.data.sources.documents import Split
from jaxlm.data.tokenizers import Tokenizer
from jaxlm.data.tokens import Tokens

SAMPLE_TOKENS, BLOCK = 10_000_000, 1 << 16  # tokens counted at most, in contiguous blocks of BLOCK
SAMPLE_DOCUMENTS = 1_000_000  # documents whose lengths are used, at most
MARKS = "⟨⟩‹›"  # ⟨⟩ enclose ids that are not text, ‹› enclose text that is not learned
PADDING_EDGES = (0.0, 0.01, 0.05, 0.1, 0.25, 0.5, 1.0)  # bins of the histogram of rows by their share of padding


def visible(data: bytes, lines: bool = True) -> str:
    """Returns bytes as text that is safe to print on a terminal.

    Invalid UTF-8, unprintable characters and MARKS become escapes such as \\x1b and \\u27e8.

    Args:
      lines: whether to keep newlines.
    """
    kept = "\n" if lines else ""
    text = data.decode("utf-8", "backslashreplace")
    fine = (
        c if c in kept or (c.isprintable() and c not in MARKS) else c.encode("unicode_escape").decode() for c in text
    )
    return "".join(fine)


def decoded(ids: list[int], tokenizer: Tokenizer | None, lines: bool = True) -> list[tuple[str, bool]]:
    """Returns pieces (string, whether it is text) that ids stand for. Ids without text become names such as ⟨bos⟩."""
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
    """The part of a document that is in a row."""

    start: int  # its first place in the row
    length: int  # number of its places in the row
    opens: bool | None  # whether the document starts here; None if unknown, without a tokenizer
    ids: np.ndarray  # int32 [n]: the inputs, then the last target if it counts and no other part shows it
    learned: np.ndarray  # bool [n]: whether each id counts towards the loss as a target
    prompt_length: int = 0  # number of its places in the encoder's row, if there is an encoder


@dataclasses.dataclass(frozen=True)
class InspectedBatch:
    """A batch of training or validation: rows [R, T]."""

    rows: Rows
    filled: np.ndarray  # int64 [R]: number of places in each row that are not padding
    sources: np.ndarray | None  # int64 [R]: index of each row's source in the corpus's shares; None without a mixture
    bos_id: int | None  # None without a tokenizer

    def pieces(self, row: int) -> Iterator[DocumentPart]:
        """Yields the parts of documents in a row."""
        inputs, targets, filled = self.rows["inputs"][row], self.rows["targets"][row], int(self.filled[row])
        alone = "positions" in self.rows  # packed documents neither attend to nor predict each other
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
            learned, prompt_length = learned[: len(ids)], 0
            if "prompts" in self.rows:  # shown in place of the bos that opens the answer
                prompt = self._prompt(row, int(np.searchsorted(starts, a)))
                ids, prompt_length = np.concatenate([prompt, ids[1:]]), len(prompt)
                learned = np.concatenate([np.zeros(len(prompt), bool), learned[1:]])
            opens = None if self.bos_id is None else bool(inputs[a] == self.bos_id)
            yield DocumentPart(a, b - a, opens, ids, learned, prompt_length)

    def _prompt(self, row: int, number: int) -> np.ndarray:
        """Returns the prompt of a pair of a row, by its number there."""
        positions = self.rows["prompt_positions"][row]
        starts = np.append(np.flatnonzero(positions == 0), len(positions))
        return self.rows["prompts"][row, starts[number] : starts[number + 1]]

    def counts(self, rows: slice = slice(None)) -> dict[str, Any]:
        """Counts the targets of some rows by kind, and the documents or parts of documents (None if unknown)."""
        targets, filled = self.rows["targets"][rows], int(self.filled[rows].sum())
        learned, picked = int((targets >= 0).sum()), range(len(self.filled))[rows]
        found = None if self.bos_id is None else sum(1 for row in picked for _ in self.pieces(row))
        return {
            "rows": len(picked),
            "targets": targets.size,
            "learned": learned,
            "masked": filled - learned,
            "padding": targets.size - filled,
            "documents": found,
        }


class View:
    """The batches of a split, and statistics of its rows."""

    def __init__(self, corpus: Corpus, config: Config, split: Split):
        self.corpus, self.config = corpus, config
        self.order = TrainOrder(corpus, config) if split == "train" else None
        if self.order:
            self._mixed = self.order.mixed  # tells the source of a row, which batches do not
            self.parts, self.num_batches = self._mixed.parts, config.steps
            self._weights = [share.weight for share in corpus.shares] or [1.0]
        else:
            self.parts = [make_order(share.val, config) for share in corpus.parts]
            rows = np.array([part.num_eval_rows for part in self.parts])
            self._weights = (rows / rows.sum()).tolist()
            self._ends = np.cumsum(-(-rows // config.batch_size))  # number of the batch after each source's last
            self.num_batches = int(self._ends[-1])

    def batch(self, n: int) -> InspectedBatch:
        """Returns the training batch of step n + 1, or validation batch n (counted from 0).

        The last validation batch of each source may have fewer rows.
        """
        tokenizer, size, sources = self.corpus.tokenizer, self.config.batch_size, None
        if self.order:
            rows = {name: batches[0] for name, batches in self.order.batches(n, 1).items()}
            filled = self._filled(rows, np.full(size, self.config.seq_len))
            if self.corpus.shares:
                sources = self._mixed.source_and_index(np.arange(n * size, (n + 1) * size))[0]
        else:
            k = int(np.searchsorted(self._ends, n, "right"))
            part, first = self.parts[k], (n - int(self._ends[k - 1] if k else 0)) * size
            places = np.arange(first, min(first + size, part.num_eval_rows))
            rows = part.eval_rows(places)
            filled = self._filled(rows, self._targets(k) - places * self.config.seq_len)
            if self.corpus.shares:
                sources = np.full(len(places), k)
        return InspectedBatch(rows, filled, sources, tokenizer and tokenizer.bos_id)

    def _targets(self, k: int) -> int:
        """Returns the number of targets in a source's validation set, with concatenated documents."""
        return len(self.corpus.parts[k].val) - 1

    def _filled(self, rows: Rows, left: np.ndarray) -> np.ndarray:
        """Returns the number of places in each row that are not padding, int64 [R].

        Args:
          left: int64 [R], targets from the start of each row to the end of the data; unused with packed documents.
        """
        T = rows["inputs"].shape[1]
        if "positions" not in rows:
            return np.minimum(left, T)
        # Padding: a document would start here, the next place does not continue it, and the target does not count.
        stops = np.pad(rows["positions"][:, 1:] == 0, ((0, 0), (0, 1)), constant_values=True)
        return T - ((rows["positions"] == 0) & stops & (rows["targets"] < 0)).sum(1)

    def padding(self) -> tuple[float, np.ndarray]:
        """Returns the share of padding in all places of the split, and a histogram of its rows (float64 [7]).

        Bin 0 is the share of rows without padding. Bin i is the share of rows with more than PADDING_EDGES[i - 1] and
        at most PADDING_EDGES[i] padding. Sources of a mixture count with their weights; in validation, with their
        numbers of rows.
        """
        total, rows = 0.0, np.zeros(len(PADDING_EDGES))
        for k, weight in enumerate(self._weights):
            empty = self._padding(k)
            total += weight * float(empty.mean())
            bins = np.searchsorted(PADDING_EDGES, empty)
            rows += weight * np.bincount(bins, minlength=len(PADDING_EDGES)) / len(empty)
        return total, rows

    def _padding(self, k: int) -> np.ndarray:
        """Returns the share of padding in each row of a source, float64 [rows]; if no row has any, one 0 for all."""
        part, T = self.parts[k], self.config.seq_len
        if isinstance(part, Packed | PackedPairs):
            return 1 - part.filled() / T
        if self.order:
            return np.zeros(1)
        return np.append(np.zeros(part.num_eval_rows - 1), part.num_eval_rows - self._targets(k) / T)


def mixture_shares(view: View, batch: InspectedBatch, n: int) -> list[dict[str, Any]]:
    """Returns each source's share of the rows in batch n (counted from 0) and in all batches up to it, its weight
    ("wanted"), and its epochs in the whole run. Returns [] for validation and without a mixture.
    """
    if batch.sources is None or view.order is None:
        return []
    found = np.bincount(batch.sources, minlength=len(view.corpus.shares)) / len(batch.sources)
    places = (n + 1) * view.config.batch_size * view.config.seq_len
    so_far, run = view.order.consumed(n + 1), view.order.consumed(view.num_batches)
    return [
        {
            "source": share.name,
            "batch": here,
            "so_far": before.tokens / places,
            "wanted": share.weight,
            "epochs": whole.epochs,
        }
        for share, here, before, whole in zip(view.corpus.shares, found.tolist(), so_far, run, strict=True)
    ]


def spread(total: int, count: int) -> np.ndarray:
    """Returns `count` of the numbers 0 ... total - 1, evenly spaced (int64), or all if there are not more."""
    return np.arange(total) if total <= count else np.arange(count) * total // count


def _blocks(tokens: Tokens) -> Iterator[np.ndarray]:
    """Yields all tokens, or evenly spaced blocks of them with at most SAMPLE_TOKENS in total."""
    for block in spread(-(-len(tokens) // BLOCK), max(1, SAMPLE_TOKENS // BLOCK)).tolist():
        yield from map(np.asarray, tokens.parts(block * BLOCK, (block + 1) * BLOCK))


def token_counts(tokens: Tokens, vocab_size: int) -> np.ndarray:
    """Returns how often each id occurs in the sample, int64 [vocab_size]."""
    counts = np.zeros(vocab_size, np.int64)
    for block in _blocks(tokens):
        counts += np.bincount(block.astype(np.int64), minlength=vocab_size)
    return counts


def learned_share(tokens: Tokens) -> float:
    """Returns the share of the sampled tokens that count towards the loss as targets."""
    if tokens.masks is None:
        return 1.0
    return float(np.concatenate([*_blocks(Tokens(tokens.masks))]).mean())


class PairFacts(NamedTuple):
    """What an encoder's pairs lose, and what their rows waste."""

    longer_prompts: float  # share of the prompts that lose their ends
    longer_answers: float
    prompt_padding: float  # share of padding in the encoder's rows
    median_prompt: int  # tokens, with bos
    longest_prompt: int
    median_answer: int
    longest_answer: int


def pair_facts(view: View) -> PairFacts | None:
    """Returns facts about the pairs of all sources; None without an encoder."""
    orders = [part for part in view.parts if isinstance(part, PackedPairs)]
    if not orders:
        return None
    S, T = orders[0].S, orders[0].T
    prompts, answers = (np.concatenate(x) for x in zip(*(lengths_of(order.pairs) for order in orders), strict=True))
    places = S * sum(order.num_eval_rows for order in orders)
    filled = np.minimum(prompts, S).sum() / places
    return PairFacts(
        longer_prompts=float((prompts > S).mean()),
        longer_answers=float((answers > T).mean()),
        prompt_padding=float(1 - filled),
        median_prompt=int(np.median(prompts)),
        longest_prompt=int(prompts.max()),
        median_answer=int(np.median(answers)),
        longest_answer=int(answers.max()),
    )


class Documents(NamedTuple):
    lengths: np.ndarray  # int64 [n], in tokens, bos included
    total: int | None  # number of documents in the split; None if not counted, `lengths` are then of the first ones

    def summary(self, seq_len: int) -> dict[str, Any]:
        """Returns statistics of the lengths as a JSON object."""
        lengths = self.lengths
        return {
            "total": self.total,
            "counted": len(lengths),
            "mean": float(lengths.mean()),
            "median": float(np.median(lengths)),
            "min": int(lengths.min()),
            "max": int(lengths.max()),
            "longer_than_seq_len": float((lengths > seq_len).mean()),
        }


def documents(corpus: Corpus, split: Split) -> Documents | None:
    """Returns the lengths of a split's documents, or of an evenly spaced sample; None if unknown."""
    tokens: Tokens = getattr(corpus, split)
    if corpus.tokenizer is None:
        return None
    if "documents" not in corpus.facts[split] and len(tokens) > SAMPLE_TOKENS:
        # In files of bare tokens, only reading all of them would find all document starts: read the beginning.
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
