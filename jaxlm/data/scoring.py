"""Makes the batches of an evaluation: the whole validation set, or a part that is spread evenly over it.

Every target (all ids of a source but the first) is in exactly one row. With packed documents, the bos that ends the
last document is a target too. Each batch belongs to one source of a mixture, so that each source has its own score.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from jaxlm.config import Config
from jaxlm.data.corpus import Corpus
from jaxlm.data.order import make_order
from jaxlm.data.stream import HostBatch, Share


class Scored(NamedTuple):
    """A batch, with its source and how much its sums count."""

    source: str  # name of the mixture's source; "" without a mixture
    weight: float  # rows of the source / scored rows of the source; 1 if all are scored
    batch: HostBatch


def eval_batches(
    corpus: Corpus,
    config: Config,
    rows_per_batch: int,
    share: Share,
    limit: int = 0,
) -> Iterator[Scored]:
    """Returns this process's part of the validation batches, source after source, rows in the order of the corpus.

    The last row and the last batch of a source are padded with targets of -1, which do not count. All batches therefore
    have the same shape, and all processes the same number of batches.

    Args:
      rows_per_batch: rows of a batch over all processes and devices.
      limit: about how many batches to score, split among the sources by their sizes, at least one each; 0 for all.

    Raises:
      UserError: rows_per_batch does not divide evenly over the devices.
    """
    here = share.rows(rows_per_batch, "the evaluation batch")
    orders = [make_order(part.val, config) for part in corpus.parts]
    picked = scored_rows([order.num_eval_rows for order in orders], rows_per_batch, limit)

    def batches() -> Iterator[Scored]:
        for part, order, places in zip(corpus.parts, orders, picked, strict=True):
            num_rows = -(-len(places) // rows_per_batch) * rows_per_batch
            padded = np.full(num_rows, order.num_eval_rows)  # rows beyond the end are padding
            padded[: len(places)] = places
            for rows in padded.reshape(-1, rows_per_batch):
                weight = order.num_eval_rows / len(places)
                yield Scored(part.name, weight, share.shard(order.eval_rows(rows[here])))

    return batches()


def num_eval_batches(corpus: Corpus, config: Config, rows_per_batch: int, limit: int = 0) -> int:
    """Returns the number of batches that `eval_batches` gives."""
    counts = [make_order(part.val, config).num_eval_rows for part in corpus.parts]
    return sum(-(-len(places) // rows_per_batch) for places in scored_rows(counts, rows_per_batch, limit))


def scored_rows(counts: list[int], rows_per_batch: int, limit: int) -> list[np.ndarray]:
    """Returns which rows (int64, rising) of each source are scored.

    Args:
      counts: number of rows of each source.
      limit: as in `eval_batches`.
    """
    whole = [-(-count // rows_per_batch) for count in counts]
    if not limit or limit >= sum(whole):
        return [np.arange(count) for count in counts]
    shares = np.diff(np.round(np.cumsum([0, *counts]) * limit / sum(counts)).astype(int))
    sizes = [min(count, max(1, int(n)) * rows_per_batch) for count, n in zip(counts, shares, strict=True)]
    return [np.arange(size) * count // size for size, count in zip(sizes, counts, strict=True)]
