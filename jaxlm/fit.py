"""How many optimizer steps fit into a time on this machine, measured before a run begins.

The schedule of the learning rate depends on the number of steps, so it has to be known from the first one on: a run
that is only cut off would end at a high learning rate.
"""

import dataclasses
import time

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxlm import data, runtime
from jaxlm import step as steps
from jaxlm.checkpoint import place
from jaxlm.config import Config, UserError, validate
from jaxlm.model import make_model

WARM, TIMED, SHARE = 2, 8, 0.94  # steps run before the clock starts and timed; what the loop leaves to the steps


def fit(config: Config, deadline: float) -> Config:
    """The configuration with `steps` lowered to what can be trained before `deadline`, if not all of them can.

    Compiles the step and runs it a few times on a state that is thrown away; the time of compiling it once more, with
    the other number of steps in its schedule, is taken off. With several processes the first one decides.

    Args:
      deadline: of `time.monotonic()`.

    Raises:
      UserError: too few steps would be left.
    """
    compiling, seconds = _measure(config)
    count = fitting(config.steps, deadline - time.monotonic(), compiling, seconds)
    if jax.process_count() > 1:
        count = int(multihost_utils.broadcast_one_to_all(np.array(count)))
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
    local = [d for d in devices if d.process_index == jax.process_index()]
    model = make_model(config.model, corpus.vocab_size, config.seq_len)
    state = place(steps.init_state(config, model, len(local)), local)
    step = steps.pmap_train_step(steps.make_train_step(config, model, devices), devices)
    batches = data.train_stream(
        corpus, config, 0, num_devices=len(local), process_index=jax.process_index(), process_count=jax.process_count()
    )
    try:
        sharding = NamedSharding(Mesh(np.array(local), (steps.AXIS,)), PartitionSpec(steps.AXIS))
        batch = jax.device_put(next(batches), sharding)
    finally:
        batches.close()

    def run(count: int) -> float:
        nonlocal state
        start = time.perf_counter()
        for _ in range(count):
            state, _ = step(state, batch)
            jax.block_until_ready(state.step)
        return time.perf_counter() - start

    compiling = run(1)
    run(WARM)
    return compiling, run(TIMED) / TIMED
