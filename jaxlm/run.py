"""A run from its configuration to its last line: hangs the hooks on the loop, and says what comes out."""

import dataclasses
import json
import os
import shlex
import shutil
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import jax

from jaxlm import data, distributed, metrics, runtime
from jaxlm import step as steps
from jaxlm import workdir as workdirs
from jaxlm.cli import from_saved, read_saved
from jaxlm.config import Config, UserError
from jaxlm.console import human
from jaxlm.data.conversations import trains_on_answers
from jaxlm.evaluate import Interrupted
from jaxlm.fit import fit
from jaxlm.hooks import Profiler, all_finite, bad_since, make_evaluation, make_log, make_on_step
from jaxlm.model import num_params
from jaxlm.parts import Parts, build, go_back, train_batches
from jaxlm.prompts import encode_prompt
from jaxlm.recovery import Diverged, Trouble
from jaxlm.saving import Unsaved
from jaxlm.stop import EXIT_CODE as STOPPED
from jaxlm.stop import StopSignal, make_stop
from jaxlm.train import train
from jaxlm.watchdog import Watchdog


def run(config: Config, workdir: Path, deadline: float | None = None, stop: StopSignal | None = None) -> int:
    """Trains; returns the exit code.

    Args:
      deadline: of `time.monotonic()`, for a new run: it makes fewer steps where not all of `steps` fit before that.

    Raises:
      UserError: data, workdir or devices do not fit the configuration.
      CheckpointError: there are checkpoints, and none of them can be used.
      Diverged: training went wrong, and again after it went back to earlier checkpoints.
      Unsaved: the last state could not be written.
      Stopped: a signal came before training began.
    """
    stop, asked = stop or StopSignal(), config.steps
    if deadline is not None:
        config = _fitted(config, workdir, deadline)
    with workdirs.Lock() as lock:
        return _run(config, workdir, lock, stop, asked)


def _run(config: Config, workdir: Path, lock: workdirs.Lock, stop: StopSignal, asked: int) -> int:
    parts, state, start = build(config, workdir, lock)
    describe(parts, state, start)
    if config.steps < asked:
        parts.reporter.say(f"--max_minutes: {config.steps} of {asked} steps fit on this machine")
    owed = _owes_evaluation(parts, start)
    if start == config.steps and not owed:  # a finished run: its numbers are written already
        try:
            scores = make_evaluation(parts, write=lambda metrics: None)(start, state)
        except Trouble as trouble:
            raise Diverged(f"training diverged: {trouble}") from trouble
    else:
        while True:
            try:
                step, scores = _train(parts, state, start, stop, owed)
                break
            except Trouble as error:
                trouble = Trouble(error.first, error.last, error.why)  # without frames that hold on to the state
            del state
            parts, state, start = go_back(parts, trouble)
            owed = False  # it was whole before that
        if step < config.steps or not scores:
            parts.reporter.say(f"stopped after step {step}, saved; run the same command again to go on")
            return STOPPED
    finish(parts, scores)
    return 0


def _fitted(config: Config, workdir: Path, deadline: float) -> Config:
    """With the number of steps that fits before the deadline; a run that has begun keeps the number it was given."""
    workdirs.check(workdir, config)
    if workdirs.holds_checkpoints(workdir):
        saved, _ = from_saved(read_saved(workdir / "config.json")["config"], str(workdir / "config.json"))
        return dataclasses.replace(config, steps=min(config.steps, saved.steps))
    return fit(config, deadline)


def _train(
    parts: Parts, state: steps.TrainState, start: int, stop: StopSignal, owed: bool
) -> tuple[int, dict[str, Any]]:
    """The loop with its hooks; returns the updates done and, where it has just been evaluated, the state's scores.

    Args:
      owed: whether the evaluation after step `start` is still to be made.
    """
    stop.defer()
    config, saver = parts.config, parts.saver
    log = make_log(parts, start)
    watchdog = Watchdog(config.log.hang_seconds, config.log.hang_abort)
    asked = make_stop(stop, parts.placement.batch)
    evaluation = make_evaluation(parts, log, watchdog.at, asked)
    evaluated, scores = -1, {}

    def evaluate(step: int, state: steps.TrainState) -> None:
        nonlocal evaluated, scores
        with suppress(Interrupted):  # the same command makes it when it goes on
            evaluated, scores = step, evaluation(step, state)
            saver.scored(step, scores["eval_loss"])

    def save(step: int, state: steps.TrainState, act: Callable = saver.save) -> None:
        if not all_finite(state.params):
            raise bad_since(parts, step, f"the parameters after step {step} are not finite")
        act(step, parts.placement.saved(state), log.sync)

    profiler = Profiler(parts.workdir / "profile", start, config.steps, config.log.profile_steps)
    hooks = [(profiler.due, profiler), (_due(config, config.eval.every_steps), evaluate),
             (lambda step: _due(config, config.checkpoint.every_steps)(step) or saver.due(), save)]  # fmt: skip
    step_of_one = steps.make_train_step(config, parts.model, parts.devices)
    batches = train_batches(parts, start)
    try:
        watchdog.start()
        if saver.saved is None:
            save(0, state)
        if profiler.due(start):
            profiler(start, state)
        parts.reporter.start()
        if owed:
            evaluate(start, state)
        state, step = train(
            state, steps.pmap_train_step(config, step_of_one, parts.devices), batches, start=start, steps=config.steps,
            sharding=parts.placement.batch, on_step=make_on_step(parts, log, state.params, start), hooks=hooks,
            stop=asked, at=watchdog.at,
        )  # fmt: skip
        watchdog.stop()
        save(step, state, saver.finish)
        try:
            log.finish()
        except OSError as error:
            raise Unsaved(f"{parts.workdir}: the last metrics cannot be written: {error}") from error
    finally:
        watchdog.stop()
        parts.reporter.stop()
        profiler.close()
        batches.close()
        saver.close()
    return step, scores if step == evaluated else {}


def _due(config: Config, period: int) -> Callable[[int], bool]:
    return lambda step: step == config.steps or (period > 0 and step % period == 0)


def _owes_evaluation(parts: Parts, start: int) -> bool:
    """Whether the run was stopped in the evaluation after the step from which it goes on."""
    if start == 0 or not _due(parts.config, parts.config.eval.every_steps)(start):
        return False
    known = distributed.of_first(
        "the evaluations so far", lambda: json.dumps(start in metrics.validation_losses(parts.workdir))
    )
    return not json.loads(known)


def describe(parts: Parts, state: steps.TrainState, start: int) -> None:
    """The lines of facts at the start."""
    c, facts, say = parts.config, parts.corpus.facts, parts.reporter.say
    per_step = c.batch_size * c.seq_len
    epochs = c.steps * per_step / len(parts.corpus.train)
    say(
        f"jaxlm · {len(parts.devices)} x {parts.devices[0].device_kind} · {human(num_params(state.params))} parameters"
        f" · {human(per_step)} tokens per step · {c.steps} steps = {human(c.steps * per_step)} tokens"
        f" ({epochs:.2f} epochs) · {parts.workdir}"
    )

    def size(split: str) -> str:
        known = [k for k in ("documents", "bytes", "tokens") if k in facts[split]]
        return f"{split}: " + ", ".join(f"{human(facts[split][k])} {k}" for k in known)

    if jax.default_backend() == "gpu" and os.environ.get("XLA_FLAGS"):
        say(f"XLA_FLAGS={os.environ['XLA_FLAGS']}")
    if runtime.on_cpu() and c.model.matmul_precision == "fastest":
        how = "operands rounded to bfloat16, in AMX tiles" if runtime.has_amx() else "float32, for this CPU has no AMX"
        say(f"model.matmul_precision=fastest · products: {how}")
    say(f"{'mixture' if c.data.mixture else c.data.source} · {size('train')} · {size('val')}")
    for share, had in zip(parts.corpus.shares, parts.order.consumed(c.steps), strict=False):
        say(f"  {share.weight:.3g} of {share.name}: {human(len(share.train))} tokens, {had.epochs:.2f} epochs in all")
    if start:
        say("finished: nothing left to train" if start == c.steps else f"goes on after step {start}")


def finish(parts: Parts, scores: dict[str, Any]) -> None:
    """The end: the score beside those of compressors, and what to type next."""
    say, workdir, bits = parts.reporter.say, parts.workdir, scores["eval_bits_per_byte"]
    whole = not parts.config.eval.batches  # else the compressors would be given other bytes than the model
    if bits is not None and whole and parts.config.eval.baselines and jax.process_index() == 0:
        baselines = data.compression_baselines(parts.corpus)
        if baselines:
            parts.reporter.comparison(baselines, bits)
    say(f"next: {_next(parts, shlex.quote(str(workdir)))}")


def _next(parts: Parts, workdir: str) -> str:
    """A command to try the model with."""
    c, tokenizer = parts.config, parts.corpus.tokenizer
    if tokenizer is None:
        return f"{command('evaluate')} --workdir {workdir}"
    chat = trains_on_answers(c.data)
    prompt = next(iter(c.eval.sample_prompt.strip().splitlines()), "")
    try:
        encode_prompt(tokenizer, c.data, prompt, chat)
    except UserError:  # of another alphabet
        prompt = ""
    if prompt == "-" or not prompt.isprintable():  # which would be stdin, or look strange here
        prompt = ""
    return f"{command('generate')} --workdir {workdir}{' --chat' * chat} --prompt {shlex.quote(prompt)}"


def command(tool: str) -> str:
    """A command line that starts a tool from the folder that we are in, with the Python that we run in."""
    path = Path(__file__).parents[1] / "tools" / f"{tool}.py"
    python = "python" if shutil.which("python") == sys.executable else _nearby(sys.executable)
    return f"{shlex.quote(python)} {shlex.quote(_nearby(str(path)))}"


def _nearby(path: str) -> str:
    """Relative where that is inside the folder that we are in."""
    return path if os.path.relpath(path).startswith("..") else os.path.relpath(path)
