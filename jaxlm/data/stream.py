"""Makes training batches ahead of time, in a tf.data pipeline.

order.py decides which tokens are in a batch; this module makes the batch, shaped [local devices, sequences per device,
T]. Importing TensorFlow takes seconds. So the first PATIENCE batches are made on demand, and then a thread imports it
in the background. Without TensorFlow, a Python thread makes batches ahead.
"""

import contextlib
import queue
import threading
from collections.abc import Callable, Generator, Iterable
from typing import Any, Literal, NamedTuple

import numpy as np

from jaxlm.config import Config, UserError
from jaxlm.data.order import TrainOrder
from jaxlm.data.tf_import import import_tensorflow
from jaxlm.host.runtime import IMPORTER

HostBatch = dict[str, np.ndarray]  # inputs, targets and, with packed documents, positions: int32 [devices, B, T]
MakeBatches = Callable[[int, int], HostBatch]  # (first, count) -> batches first ... first + count - 1: [count, ...]

AHEAD = 4  # at least so many batches are ready before they are asked for
BLOCK, BLOCK_BYTES = 16, 2**20  # limits of the batches made in one call: their number, and their size in bytes
PATIENCE = 64  # batches served before the import of TensorFlow starts: a short run need not pay for it


class Share(NamedTuple):
    """Which part of each batch a process reads. Each replica, some neighbouring devices, works on rows of its own."""

    num_devices: int  # of one process; all processes have the same number
    process_index: int = 0
    process_count: int = 1
    of_a_replica: int = 1  # devices

    def rows(self, num_rows: int, key: str) -> slice:
        """Returns the rows of a global batch that this process reads.

        Args:
          key: name of `num_rows` in the error message.

        Raises:
          UserError: the rows do not divide evenly over all replicas.
        """
        replicas, rest = divmod(self.num_devices * self.process_count, self.of_a_replica)
        if rest or num_rows % replicas:
            each = f" / {self.of_a_replica} devices of a replica" if self.of_a_replica > 1 else ""
            count = f"{self.num_devices} devices x {self.process_count} hosts{each}"
            raise UserError(f"{key} is {num_rows}; allowed: a multiple of {count}")
        here, each = self._replicas(), num_rows // replicas
        return slice(here[0] * each, (here[-1] + 1) * each)

    def shard(self, rows: HostBatch) -> HostBatch:
        """Gives each device the rows of its replica: [..., R, T] -> [..., devices, B, T]."""
        here = self._replicas() - self._replicas()[0]
        whole = {k: v.reshape(*v.shape[:-2], here[-1] + 1, -1, v.shape[-1]) for k, v in rows.items()}
        return whole if self.of_a_replica == 1 else {k: np.take(v, here, axis=-3) for k, v in whole.items()}

    def _replicas(self) -> np.ndarray:
        """The replica of each device."""
        return (self.process_index * self.num_devices + np.arange(self.num_devices)) // self.of_a_replica


def train_stream(
    order: TrainOrder,
    config: Config,
    start_step: int,
    share: Share,
    backend: Literal["auto", "tf", "thread"] = "auto",
) -> "TrainStream":
    """Returns this process's part of the batches of steps start_step + 1 … config.steps.

    Args:
      backend: what makes batches ahead: tf.data, a thread, or tf.data where it can be imported ("auto"). The batches
        do not depend on it.

    Raises:
      UserError: batch_size does not divide evenly over the devices.
    """
    rows = share.rows(config.batch_size, "batch_size")
    return TrainStream(
        lambda first, count: share.shard(order.batches(first, count, rows)), start_step, config.steps, backend
    )


class TrainStream:
    """An iterator over batches. `next` raises the errors of making a batch; `close` ends the background work."""

    def __init__(self, make: MakeBatches, start: int, stop: int, backend: str = "auto"):
        self._make, self._next, self._stop = make, start, stop
        self._served = 0
        self._ahead: Generator[HostBatch, None, None] | None = None
        self._open: Callable[[MakeBatches, int, int], Generator[HostBatch, None, None]] | None = None
        self._importer = threading.Thread(target=self._choose, args=(backend,), name=IMPORTER, daemon=True)
        if backend != "auto":
            self._choose(backend)

    def _choose(self, backend: str) -> None:
        """Sets what makes further batches; imports TensorFlow unless `backend` is "thread"."""
        if backend != "thread":
            try:
                import_tensorflow()
                self._open = _tf_batches
                return
            except Exception:  # TensorFlow is absent or broken; a thread does without it
                if backend == "tf":
                    raise
        self._open = _thread_batches

    def __iter__(self) -> "TrainStream":
        return self

    def __next__(self) -> HostBatch:
        n = self._next
        if n >= self._stop:
            self.close()
            raise StopIteration
        if self._ahead is None and self._open is not None:
            self._ahead = self._open(self._make, n, self._stop)
        elif self._open is None and self._served == PATIENCE:
            self._importer.start()
        batch = _one(self._make, n) if self._ahead is None else next(self._ahead)
        self._next += 1
        self._served += 1
        return batch

    def settle(self) -> None:
        """Waits for an import of TensorFlow in progress to end; for measurements."""
        if self._importer.is_alive():
            self._importer.join()

    def close(self) -> None:
        """Ends the background work; the iterator gives no further batches."""
        self._stop = self._next
        if self._ahead is not None:
            self._ahead.close()
            self._ahead = None


def _one(make: MakeBatches, n: int) -> HostBatch:
    """Makes batch n alone."""
    return {name: batches[0] for name, batches in make(n, 1).items()}


def _block(probe: HostBatch) -> int:
    """Returns how many batches to make in one call.

    Even for tiny batches, a call costs almost a millisecond in tf.data and a quarter of one in the order.
    """
    return max(1, min(BLOCK, BLOCK_BYTES // sum(x.nbytes for x in probe.values())))


def _tf_batches(make: MakeBatches, start: int, stop: int) -> Generator[HostBatch, None, None]:
    """Yields batches from tf.data, which maps step numbers to blocks of whole batches and prefetches them in order."""
    tf = import_tensorflow()
    probe = _one(make, start)
    size = _block(probe)

    def load(first: np.ndarray) -> list[np.ndarray]:
        batches = make(int(first), min(size, stop - int(first)))
        return [batches[name] for name in probe]

    @tf.autograph.experimental.do_not_convert  # a signal would leave a temporary file of AutoGraph behind
    def to_block(first: Any) -> dict[str, Any]:
        arrays = tf.numpy_function(load, [first], [x.dtype for x in probe.values()])
        return {name: tf.ensure_shape(a, (None, *probe[name].shape)) for name, a in zip(probe, arrays, strict=True)}

    options = tf.data.Options()
    options.deterministic = True
    options.autotune.enabled = False
    options.threading.private_threadpool_size = 2
    dataset = tf.data.Dataset.range(start, stop, size).map(to_block, num_parallel_calls=1, deterministic=True)
    blocks = dataset.prefetch(-(-AHEAD // size)).with_options(options).as_numpy_iterator()
    try:
        for first in range(start, stop, size):
            try:
                block = next(blocks)
            except tf.errors.OpError:  # make the batches here: the failing one raises its own error, not TensorFlow's
                yield from (_one(make, n) for n in range(first, min(first + size, stop)))
                raise
            yield from ({name: block[name][i] for name in probe} for i in range(min(size, stop - first)))
    finally:
        del blocks


def _thread_batches(make: MakeBatches, start: int, stop: int) -> Generator[HostBatch, None, None]:
    """Yields batches from a thread that keeps a short queue full."""
    ready: queue.Queue[HostBatch | Exception] = queue.Queue(maxsize=max(AHEAD, BLOCK))  # the loop may take several
    closed = threading.Event()

    def put(item: HostBatch | Exception) -> None:
        while not closed.is_set():
            with contextlib.suppress(queue.Full):
                return ready.put(item, timeout=0.1)

    def work() -> None:
        try:
            size = _block(_one(make, start))
            for first in range(start, stop, size):
                if closed.is_set():
                    return
                count = min(size, stop - first)
                try:
                    block = make(first, count)
                    batches: Iterable[HostBatch] = [{k: v[i] for k, v in block.items()} for i in range(count)]
                except Exception:  # make the batches one by one: serve those before the failing one, which fails again
                    batches = (_one(make, n) for n in range(first, first + count))
                for batch in batches:
                    put(batch)
        except Exception as error:
            put(error)

    thread = threading.Thread(target=work, name="batches", daemon=True)
    thread.start()
    try:
        for _ in range(start, stop):
            item = None
            while item is None:
                try:
                    item = ready.get(timeout=1)
                except queue.Empty:
                    if not thread.is_alive() and ready.empty():
                        raise RuntimeError("the thread that makes batches ended without an error") from None
            if isinstance(item, Exception):
                raise item
            yield item
    finally:
        closed.set()
        thread.join()
