"""What a configuration and its data determine before any state exists: model, devices, placement, batches, programs.

Training, the time budget, `jaxlm evaluate` and `jaxlm bench` all start from a `Setup`.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import jax

from jaxlm import data
from jaxlm.config import Config
from jaxlm.host import runtime
from jaxlm.model import Model, make_model
from jaxlm.train import step as train_step
from jaxlm.train import trained
from jaxlm.train.placement import Placement
from jaxlm.train.schedules import UNTOUCHED, LrHistory
from jaxlm.train.step import Device


@dataclass(frozen=True)
class Setup:
    config: Config
    corpus: data.Corpus
    model: Model
    devices: list[Device]  # of all processes
    placement: Placement

    def train_step(self, history: LrHistory = UNTOUCHED) -> Callable:
        """The training step on all devices, (state, batch) -> (state, metrics); the first call compiles it."""
        step = train_step.make_train_step(self.config, self.model, self.devices, history)
        return train_step.pmap_train_step(self.config, step, self.devices)

    def eval_step(self) -> Callable:
        """The evaluation step on all devices, (params, batch) -> sums; the first call compiles it."""
        step = train_step.make_eval_step(self.config, self.model, self.devices)
        return train_step.pmap_eval_step(self.config, step, self.devices)

    def train_batches(self, order: data.TrainOrder, start: int) -> data.TrainStream:
        """This process's part of the training batches, from the one after `start` updates on."""
        return data.train_stream(order, self.config, start, self._share())

    def eval_batches(self) -> Iterator[data.Scored]:
        """This process's part of the validation set, in batches as large as a micro-batch of training."""
        return data.eval_batches(self.corpus, self.config, self._eval_rows(), self._share(), self.config.eval.batches)

    def num_eval_batches(self) -> int:
        return data.num_eval_batches(self.corpus, self.config, self._eval_rows(), self.config.eval.batches)

    def _eval_rows(self) -> int:
        """Rows of a batch of an evaluation."""
        return self.config.batch_size // self.config.optim.accum_steps

    def _share(self) -> data.Share:
        """Which part of each batch this process reads."""
        here = len(self.placement.local)
        return data.Share(here, jax.process_index(), jax.process_count(), self.config.parallel.of_a_replica)


def set_up(config: Config, corpus: data.Corpus) -> Setup:
    """Raises UserError if the devices do not fit the configuration."""
    devices = runtime.choose_devices(config)
    model = make_model(config.model, corpus.vocab_size, config.seq_len, devices[0].platform)
    trained.check(config, model.shapes())
    return Setup(config, corpus, model, devices, Placement(config, model, devices))
