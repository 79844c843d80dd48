"""The batches of an evaluation: all of the validation set, or some that are spread evenly over it.

Every target (all but the first id of a source) is in one row; where packed documents see themselves alone, the bos that
ends the last one is a target too. Each batch is of one source of a mixture, so that sources have scores of their own.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from jaxlm.config import Config
from jaxlm.data.corpus import Corpus
from jaxlm.data.order import make_order
from jaxlm.data.stream import HostBatch, local_rows, shard


class Scored(NamedTuple):
    """A batch, and what its sums stand for."""

    source: str  # the name of the mixture's share; "" without a mixture
    weight: float  # rows of that source / rows of it that are scored; 1 where all are
    batch: HostBatch


def eval_batches(
    corpus: Corpus,
    config: Config,
    rows_per_batch: int,
    *,
    num_devices: int,
    process_index: int = 0,
    process_count: int = 1,
    limit: int = 0,
) -> Iterator[Scored]:
    """This process's part of the validation set, source after source, in the order of its rows.

    What is missing from the last row and the last batch of a source is filled with targets of -1, which do not count,
    so that all batches have one shape and all processes the same number of them.

    Args:
      rows_per_batch: sequences over all processes and devices.
      limit: about how many batches, spread over all sources by their sizes, at least one of each; 0 = all.

    Raises:
      UserError: rows_per_batch does not divide over the devices.
    """
    here = local_rows(rows_per_batch, "the evaluation batch", num_devices, process_index, process_count)
    orders = [make_order(share.val, config) for share in corpus.parts]
    picked = scored_rows([order.count for order in orders], rows_per_batch, limit)

    def batches() -> Iterator[Scored]:
        for share, order, places in zip(corpus.parts, orders, picked, strict=True):
            padded = np.full(-(-len(places) // rows_per_batch) * rows_per_batch, order.count)  # beyond the end
            padded[: len(places)] = places
            for rows in padded.reshape(-1, rows_per_batch):
                yield Scored(share.name, order.count / len(places), shard(order.in_order(rows[here]), num_devices))

    return batches()


def scored_rows(counts: list[int], rows_per_batch: int, limit: int) -> list[np.ndarray]:
    """The rows (int64, rising) of each source that are scored, of as many as `counts` says."""
    whole = [-(-count // rows_per_batch) for count in counts]
    if not limit or limit >= sum(whole):
        return [np.arange(count) for count in counts]
    shares = np.diff(np.round(np.cumsum([0, *counts]) * limit / sum(counts)).astype(int))
    sizes = [min(count, max(1, int(n)) * rows_per_batch) for count, n in zip(counts, shares, strict=True)]
    return [np.arange(size) * count // size for size, count in zip(sizes, counts, strict=True)]
