"""How many optimizer steps fit into a time on this machine, measured before a run begins.

The schedule of the learning rate depends on the number of steps, so it has to be known from the first one on: a run
that is only cut off would end at a high learning rate.
"""

import dataclasses
import time

from jaxlm import data
from jaxlm.config import Config, UserError
from jaxlm.config.validate import validate
from jaxlm.host import distributed, runtime
from jaxlm.model import make_model
from jaxlm.run.setup import train_batches
from jaxlm.train import step as train_step
from jaxlm.train.loop import train
from jaxlm.train.placement import Placement

WARM, TIMED = 4, 10  # steps before the clock starts, and steps that are timed
SHARE = 0.94  # of the time, that is planned for: metrics, progress and checkpoints take some


def fit(config: Config, deadline: float) -> Config:
    """The configuration with `steps` lowered to what can be trained before `deadline`, if not all of them can.

    Compiles the step and runs the loop for a few steps on a state that is thrown away; the time of compiling it once
    more, with the other number of steps in its schedule, is taken off. With several processes the first one decides.

    Args:
      deadline: of `time.monotonic()`.

    Raises:
      UserError: too few steps would be left.
    """
    compiling, seconds = _measure(config)
    count = fitting(config.steps, deadline - time.monotonic(), compiling, seconds)
    count = int(distributed.of_first("the number of steps that fit", lambda: str(count)))
    least = max(config.optim.warmup_steps, config.log.profile_steps, 1)
    if count < least:
        raise UserError(
            f"--max_minutes: {max(count, 0)} steps of {seconds * 1e3:.3g} ms fit into what is left of it;"
            f" allowed: time for {least} or more, or no --max_minutes"
        )
    return validate(dataclasses.replace(config, steps=count))


def fitting(steps: int, left: float, compiling: float, seconds: float) -> int:
    """How many of `steps`, of so many seconds each, can be made in the seconds that are left; may be negative.

    The first compilation serves all of them; fewer need another one.
    """
    if steps * seconds <= left * SHARE:
        return steps
    return min(steps, int((left - compiling) * SHARE / seconds))


def _measure(config: Config) -> tuple[float, float]:
    """Seconds to compile the step, and seconds of one."""
    corpus = data.prepare(config)
    devices = runtime.choose_devices(config)
    model = make_model(config.model, corpus.vocab_size, config.seq_len)
    placement = Placement(config, devices)
    state = placement.initial(model)
    step = train_step.pmap_train_step(config, train_step.make_train_step(config, model, devices), devices)
    few = dataclasses.replace(config, steps=WARM + TIMED)
    batches = train_batches(few, data.TrainOrder(corpus, config), placement, 0)
    ends: list[float] = []
    try:
        train(
            state, step, batches, start=0, steps=WARM + TIMED, sharding=placement.batch,
            on_step=lambda done: ends.append(done.seconds), hooks=[],
        )  # fmt: skip
    finally:
        batches.close()
    return ends[0], (ends[-1] - ends[WARM - 1]) / TIMED
