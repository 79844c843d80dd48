"""Traces a few steps for TensorBoard or Perfetto."""

from pathlib import Path

import jax

from jaxlm.train.step import TrainState


class Profiler:
    """A hook that traces `count` steps. It leaves out the first 5, which warm up, if that many are left."""

    def __init__(self, folder: Path, start: int, steps: int, count: int):
        self._folder, self._count, self._tracing = folder, count, False
        self._first = start + max(0, min(5, steps - start - count))

    def due(self, step: int) -> bool:
        return self._count > 0 and step in (self._first, self._first + self._count)

    def __call__(self, step: int, state: TrainState) -> None:
        jax.block_until_ready(state.step)
        if step == self._first:
            jax.profiler.start_trace(str(self._folder))
            self._tracing = True
        else:
            self.close()

    def close(self) -> None:
        """Writes the trace; a run may end sooner than its last traced step."""
        if self._tracing:
            self._tracing = False
            jax.profiler.stop_trace()
