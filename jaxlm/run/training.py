"""A run from its configuration to its last line: it attaches the hooks to the loop and prints the results."""

import json
import os
from collections.abc import Callable
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

import jax

from jaxlm.checkpoint import metrics_file, rollback, workdirs
from jaxlm.checkpoint.replicas import Replicas
from jaxlm.checkpoint.rollback import Diverged, Trouble
from jaxlm.checkpoint.writing import Unsaved
from jaxlm.config import Config, UserError
from jaxlm.config.pretrained import named_weights
from jaxlm.host import distributed, runtime
from jaxlm.host.signals import StopSignal
from jaxlm.host.startup import STOPPED
from jaxlm.host.stop import Interrupted, make_stop
from jaxlm.host.watchdog import Watchdog
from jaxlm.model import num_params
from jaxlm.run import metrics, report
from jaxlm.run.begin import Parts, begin
from jaxlm.run.console import human
from jaxlm.run.evaluation import make_evaluation
from jaxlm.run.finished import close
from jaxlm.run.go_back import all_finite, bad_since, go_back
from jaxlm.run.profiler import Profiler
from jaxlm.run.step_report import make_log, make_on_step
from jaxlm.run.time_budget import fit
from jaxlm.train import trained
from jaxlm.train.loop import Hook, train
from jaxlm.train.step import TrainState


def run(
    config: Config,
    workdir: Path,
    deadline: float | None = None,
    stop: StopSignal | None = None,
    lock: workdirs.Lock | None = None,
) -> int:
    """Trains; returns the exit code.

    Args:
      deadline: a time of `time.monotonic()`. A new run makes fewer steps if not all of `steps` fit before it.
      stop: SIGINT and SIGTERM. While there is nothing to save they end the process at once; later the run saves and
        returns.
      lock: the workdir's, if the caller has taken it.

    Raises:
      UserError: data, workdir or devices do not fit the configuration.
      CheckpointError: there are checkpoints, and none of them can be used.
      Diverged: training went wrong again after it went back to earlier checkpoints.
      Unsaved: the last state could not be written.
      Corrupt: devices that should hold the same state do not.
    """
    _check_lora(config, workdir)
    stop, steps_asked = stop or StopSignal(), config.steps
    if deadline is not None:
        config = _fitted(config, workdir, deadline)
    with workdirs.Lock() if lock is None else nullcontext(lock) as held:
        return _run(config, workdir, held, stop, steps_asked)


def _run(config: Config, workdir: Path, lock: workdirs.Lock, stop: StopSignal, steps_asked: int) -> int:
    parts, state, start = begin(config, workdir, lock)
    describe(parts, start)
    if config.steps < steps_asked:
        parts.reporter.say(f"--max_minutes: {config.steps} of {steps_asked} steps fit on this machine")
    owed = _owes_evaluation(parts, start)
    if start == config.steps and not owed:  # a finished run, whose numbers are written already
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
                # A copy without frames, which would keep the state alive.
                trouble = Trouble(error.first, error.last, error.why)
            del state
            parts, state, start = go_back(parts, trouble)
            owed = False  # training has passed that checkpoint before, its evaluation included
        if step < config.steps or not scores:
            parts.reporter.say(f"stopped after step {step}, saved; run the same command again to resume")
            return STOPPED
        if jax.process_count() == 1:
            stop.release("stopped after the last step, saved; run the same command again for its scores")
    if jax.process_index() == 0:
        report.write_own(workdir, parts.reporter.say)
    close(parts.reporter, config, workdir, parts.corpus, scores)
    return 0


def _check_lora(config: Config, workdir: Path) -> None:
    """Raises UserError if LoRA would be trained beside random weights."""
    resume = config.checkpoint.resume
    if config.model.lora_rank and named_weights(resume) is None and not workdirs.holds_checkpoints(workdir):
        raise UserError(
            f"checkpoint.resume is {resume!r}; allowed with model.lora_rank: the workdir of a trained model"
        )


def _fitted(config: Config, workdir: Path, deadline: float) -> Config:
    """The configuration with the steps that fit before the deadline. A run that has begun keeps its number of steps."""
    workdirs.check(workdir, config)
    if workdirs.holds_checkpoints(workdir):
        return workdirs.with_given_steps(workdir, config)
    return fit(config, deadline)


def _train(parts: Parts, state: TrainState, start: int, stop: StopSignal, owed: bool) -> tuple[int, dict[str, Any]]:
    """Runs the loop with its hooks. Returns the number of updates done, and the scores of the last state, if any.

    Args:
      owed: whether the evaluation after step `start` is still missing.
    """
    stop.release()  # until the step is compiled there is nothing to save
    config, saver = parts.config, parts.saver
    log = make_log(parts, start)
    watchdog = Watchdog(config.log.hang_seconds, config.log.hang_abort)
    asked = make_stop(stop, parts.placement.batch)
    evaluation = make_evaluation(parts, log, watchdog.reached, asked)
    scores: dict[int, dict[str, Any]] = {}  # of each evaluated step

    def evaluate(step: int, state: TrainState) -> None:
        with suppress(Interrupted):  # the resumed run makes this evaluation first
            scores[step] = evaluation(step, state)
            saver.scored(step, scores[step]["eval_loss"])

    save = _make_save(parts, log, start)
    profiler = Profiler(parts.workdir / "profile", start, config.steps, config.log.profile_steps)
    timed = parts.reporter.left.timed
    hooks = [
        Hook(profiler.due, profiler),
        Hook(_due(config, config.eval.every_steps), timed("evaluation", evaluate)),
        Hook(lambda step: _due(config, config.checkpoint.every_steps)(step) or saver.due(step), timed("save", save)),
    ]
    update = _make_step(parts, stop)
    batches = parts.train_batches(parts.order, start)
    try:
        watchdog.start()
        if saver.saved is None:
            save(0, state)
        if profiler.due(start):
            profiler(start, state)
        parts.reporter.start(start)
        if owed:
            evaluate(start, state)
        state, step = train(
            state,
            update,
            batches,
            start=start,
            steps=config.steps,
            sharding=parts.placement.batch,
            on_step=make_on_step(parts, log, start),
            hooks=hooks,
            stop=asked,
            reached=watchdog.reached,
        )
        watchdog.stop()
        save(step, state, saver.finish)
        _finish(log, parts.workdir)
    finally:
        watchdog.stop()
        parts.reporter.stop()
        profiler.close()
        batches.close()
        saver.close()
    return step, scores.get(step, {})


def _finish(log: metrics.Log, workdir: Path) -> None:
    try:
        log.finish()
    except OSError as error:
        raise Unsaved(f"{workdir}: the last metrics cannot be written: {error}") from error


def _make_save(parts: Parts, log: metrics.Log, start: int) -> Callable:
    """Returns the hook that saves a state after checking that its parameters are finite. Before that, it compares the
    devices' copies of the state (`checkpoint.check_replicas`).
    """
    replicas = Replicas(parts.config, parts.placement.here)

    def save(step: int, state: TrainState, act: Callable = parts.saver.save) -> None:
        # First, so that `all_finite`, for which each host reads its own copy, then gives the same answer on all hosts.
        if parts.config.checkpoint.check_replicas and step > start and len(parts.devices) > 1:
            replicas.check(step, state)
        if not all_finite(parts.placement.everywhere(state).params):
            raise bad_since(parts, step, f"the parameters after step {step} are not finite")
        act(step, parts.placement.saved(state), log.sync)

    return save


def _make_step(parts: Parts, stop: StopSignal) -> Callable:
    """Returns the training step on all devices; its first call shows that it compiles."""
    program, compiled = parts.train_step(parts.lr_history()), False

    def update(state: TrainState, batch: Any) -> Any:
        nonlocal compiled
        with nullcontext() if compiled else parts.reporter.phase("compiling the step", ended="compiled"):
            result = program(state, batch)
        compiled = True
        stop.defer()  # from here on there is something to save
        return result

    return update


def _due(config: Config, period: int) -> Callable[[int], bool]:
    return lambda step: step == config.steps or (period > 0 and step % period == 0)


def _owes_evaluation(parts: Parts, start: int) -> bool:
    """Whether the run was stopped during the evaluation after step `start`, from which it continues."""
    if start == 0 or not _due(parts.config, parts.config.eval.every_steps)(start):
        return False
    known = distributed.from_first(
        "the evaluations so far", lambda: json.dumps(start in metrics_file.validation_losses(parts.workdir))
    )
    return not json.loads(known)


def _grid(config: Config) -> str:
    """The directions in which devices divide more than the batch, such as ` (tensor 2)`."""
    sizes = {name: getattr(config.parallel, name) for name in ("pipeline", "context", "tensor")}
    found = ", ".join(f"{name} {size}" for name, size in sizes.items() if size > 1)
    return f" ({found})" if found else ""


def describe(parts: Parts, start: int) -> None:
    """Prints the facts of the run at its start."""
    c, facts, say = parts.config, parts.corpus.facts, parts.reporter.say
    per_step = c.batch_size * c.seq_len
    seen = parts.order.consumed(c.steps)
    epochs = seen[0].epochs if len(seen) == 1 else c.steps * per_step / len(parts.corpus.train)
    params = parts.placement.whole.params
    count, own = num_params(params), num_params(trained.part(c, params))
    of_them = f" ({human(own)} trained)" if own < count else ""
    say(
        f"jaxlm · {len(parts.devices)} x {parts.devices[0].device_kind}{_grid(c)} · {human(count)} parameters{of_them}"
        f" · {human(per_step)} tokens per step · {c.steps} steps = {human(c.steps * per_step)} tokens"
        f" ({epochs:.2f} epochs) · {parts.workdir}"
    )

    def size(split: str) -> str:
        known = [k for k in ("documents", "bytes", "tokens") if k in facts[split]]
        return f"{split}: " + ", ".join(f"{human(n := facts[split][k])} {k[:-1] if n == 1 else k}" for k in known)

    if jax.default_backend() == "gpu" and os.environ.get("XLA_FLAGS"):
        say(f"XLA_FLAGS={os.environ['XLA_FLAGS']}")
    if runtime.on_cpu() and c.model.matmul_precision == "fastest":
        how = "operands rounded to bfloat16, in AMX tiles" if runtime.has_amx() else "float32, for this CPU has no AMX"
        say(f"model.matmul_precision=fastest · products: {how}")
    say(f"{'mixture' if c.data.mixture else c.data.source} · {size('train')} · {size('val')}")
    for share, had in zip(parts.corpus.shares, seen, strict=False):
        say(f"  {share.weight:.3g} of {share.name}: {human(len(share.train))} tokens, {had.epochs:.2f} epochs in all")
    if (scale := rollback.lr_scale(parts.returns)) < 1:
        say(
            f"learning rates: {scale:.3g} times optim.lr, since the run went back to earlier checkpoints (returns.json)"
        )
    if start:
        say("finished: nothing left to train" if start == c.steps else f"resumes after step {start}")
