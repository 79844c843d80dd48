"""Continues prompts in batches over all devices, until each has ended."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np

from jaxlm.interop.batches import Devices, filled, padded_length
from jaxlm.model import ragged
from jaxlm.model.generate import BLOCK, Sampling
from jaxlm.run.open_run import Run

Ids = list[int]


class Continuer:
    """Continues prompts with the model of a run. A prompt and its continuation have at most `max_length` tokens."""

    def __init__(self, run: Run, devices: Devices, max_length: int, rows: int | None, seed: int):
        self._run, self._devices, self._max_length, self._rows = run, devices, max_length, rows
        self._begin = devices.program(partial(ragged.begin, run.model, seed=seed), in_axes=(0, 0, 0))
        self._first = run.model.first_read or max_length + 1
        read = {size: partial(ragged.read, run.model, size) for size in (*ragged.PIECES, self._first)}
        self._read = {size: devices.program(each, (None, 0, None), donate=(1,)) for size, each in read.items()}
        self._extend: dict[Sampling, Callable[..., ragged.Rows]] = {}

    def __call__(
        self,
        prompts: Sequence[Ids],
        numbers: Sequence[int],
        max_new_tokens: int,
        how: Sampling,
        ended: Callable[[Ids], bool],
        done: Callable[[int], Any] = lambda count: None,
    ) -> list[Ids]:
        """Returns the new tokens of each prompt: at most `max_new_tokens`, and a few beyond those that ended it.

        Args:
          prompts: none is empty.
          numbers: a number for each prompt; what is drawn depends on it and the seed.
          ended: whether these new tokens end a text.
          done: is called with the number of prompts of each batch.
        """
        c = self._run.config.model
        lengths = [padded_length(len(p) + max_new_tokens, self._max_length, c) for p in prompts]
        shapes = [(S, len(p) >= self._first) for S, p in zip(lengths, prompts, strict=True)]
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))  # neighbours of about the same length
        found: dict[int, Ids] = {}
        for (S, _), places, size in self._devices.batches(
            [shapes[i] for i in order], lambda shape: shape[0], self._rows
        ):
            batch = [order[place] for place in places]
            batch += batch[-1:] * (size - len(batch))
            ids = [prompts[i] for i in batch]
            new = self._continue(ids, [numbers[i] for i in batch], S, max_new_tokens, how, ended)
            found |= dict(zip(batch, new, strict=True))
            done(len(places))
        return [found[i] for i in range(len(prompts))]

    def _continue(
        self,
        prompts: Sequence[Ids],
        numbers: Sequence[int],
        S: int,
        max_new_tokens: int,
        how: Sampling,
        ended: Callable[[Ids], bool],
    ) -> list[Ids]:
        if how not in self._extend:
            extend = partial(ragged.extend, self._run.model, how)
            self._extend[how] = self._devices.program(extend, (None, 0, None, None), donate=(1,))
        lengths, params = [len(p) for p in prompts], self._devices.params
        arrays = filled(prompts, (len(prompts), S), 0), np.array(lengths, np.int32), np.array(numbers, np.int32)
        rows, position = self._begin(*map(self._devices.split, arrays)), 0
        if min(lengths) >= self._first:
            rows, position = self._read[self._first](params, rows, np.int32(0)), self._first - 1  # reads one again
        for size in ragged.PIECES:
            while position + size < min(lengths):
                rows = self._read[size](params, rows, np.int32(position))
                position += size
        last = max(lengths) + max_new_tokens - 1
        new: list[Ids] = [[] for _ in prompts]
        going = range(len(prompts))  # the rows that have not ended
        while position < last and going:
            count = min(BLOCK, last - position)
            rows = self._extend[how](params, rows, np.int32(position), np.int32(count))
            position += count
            tokens_BS = np.asarray(rows.tokens_BS).reshape(len(prompts), S)
            for i in going:
                new[i] = tokens_BS[i, lengths[i] : min(lengths[i] + max_new_tokens, position + 1)].tolist()
            going = [i for i in going if len(new[i]) < max_new_tokens and not ended(new[i])]
        return new
