"""Measures, before a run begins, how many optimizer steps fit into a time limit on this machine.

The learning-rate schedule depends on the number of steps, so the run must know it from the first step on: a run that
is simply cut off ends at a high learning rate.
"""

import dataclasses
import time

from jaxlm import data
from jaxlm.config import Config, UserError
from jaxlm.config.validate import validate
from jaxlm.host import distributed
from jaxlm.plan.memory import check_fits
from jaxlm.run.setup import set_up
from jaxlm.train.loop import train

WARM, TIMED = 4, 10  # steps before the clock starts, and timed steps
SHARE = 0.94  # of the time goes to steps; metrics, progress and checkpoints take the rest


def fit(config: Config, deadline: float) -> Config:
    """Returns the configuration, with `steps` lowered if not all of them fit before `deadline`.

    Compiles the step and runs the loop for a few steps on a state that is thrown away. With fewer steps the schedule
    is another, so the step compiles a second time; that time is subtracted. The first process decides for all.

    Args:
      deadline: a time of `time.monotonic()`.

    Raises:
      UserError: too few steps fit.
    """
    compiling, seconds = _measure(config)
    count = fitting(config.steps, deadline - time.monotonic(), compiling, seconds)
    count = int(distributed.from_first("the number of steps that fit", lambda: str(count)))
    least = max(config.optim.warmup_steps, config.log.profile_steps, 1)
    if count < least:
        raise UserError(
            f"--max_minutes: {max(count, 0)} steps of {seconds * 1e3:.3g} ms fit into what is left of it;"
            f" allowed: time for {least} or more, or no --max_minutes"
        )
    return validate(dataclasses.replace(config, steps=count))


def fitting(steps: int, left: float, compiling: float, seconds: float) -> int:
    """Returns how many of `steps`, of `seconds` each, fit into the `left` seconds; may be negative.

    If all fit, the step is compiled already; fewer steps need another compilation.
    """
    if steps * seconds <= left * SHARE:
        return steps
    return min(steps, int((left - compiling) * SHARE / seconds))


def _measure(config: Config) -> tuple[float, float]:
    """Returns the seconds that compiling the step takes, and the seconds of a step."""
    setup = set_up(config, data.prepare(config))
    check_fits(config, setup.model, setup.devices)
    state, step = setup.placement.initial(), setup.train_step()
    few = dataclasses.replace(setup, config=dataclasses.replace(config, steps=WARM + TIMED))
    batches = few.train_batches(data.TrainOrder(setup.corpus, config), 0)
    ends: list[float] = []
    try:
        train(
            state,
            step,
            batches,
            start=0,
            steps=WARM + TIMED,
            sharding=setup.placement.batch,
            on_step=lambda done: ends.append(done.seconds),
            hooks=[],
        )
    finally:
        batches.close()
    return ends[0], (ends[-1] - ends[WARM - 1]) / TIMED
