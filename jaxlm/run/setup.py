"""What a run is made of, put together from its configuration: data, model, devices, state."""

import hashlib
import importlib.util
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax

from jaxlm import data
from jaxlm.checkpoint import metrics_file, rewarm, rollback, start_from, workdirs
from jaxlm.checkpoint.reading import CheckpointError, Checkpoints
from jaxlm.checkpoint.start_from import find_whole, opened
from jaxlm.checkpoint.writing import Saver
from jaxlm.config import Config, UserError
from jaxlm.config.pretrained import Weights, named_weights, with_own_tokenizer
from jaxlm.data.prompts import encode_prompt
from jaxlm.data.sources.conversations import trains_on_answers
from jaxlm.host import distributed, runtime
from jaxlm.model import Model, make_model
from jaxlm.run.console import Reporter
from jaxlm.train import step as train_step
from jaxlm.train.placement import Placement
from jaxlm.train.schedules import LrHistory, Rewarm
from jaxlm.train.step import Device

FOLDER_LIMIT = 60  # seconds until a network's file system shows what another host has written


class Parts(NamedTuple):
    config: Config
    workdir: Path
    corpus: data.Corpus
    order: data.TrainOrder
    model: Model
    devices: list[Device]  # of all processes
    placement: Placement
    saver: Saver
    reporter: Reporter
    returns: list[rollback.Return]  # to earlier checkpoints, in the run so far
    rewarm: Rewarm | None  # of a run that went on at a higher learning rate


def build(
    config: Config, workdir: Path, lock: workdirs.Lock, quiet: bool = False
) -> tuple[Parts, train_step.TrainState, int]:
    """The parts, the state to go on from, and the number of its updates.

    Nothing is written before data, workdir, devices and checkpoint are known to fit the configuration. From then on
    the lock of the workdir is held, by the first process.

    Raises:
      UserError: they do not.
      CheckpointError: there is a checkpoint, and it cannot be used.
    """
    workdirs.check(workdir, config)
    if config.log.wandb and importlib.util.find_spec("wandb") is None:
        raise UserError("log.wandb is True; allowed: false, or the package: pip install wandb")
    weights = None if workdirs.holds_checkpoints(workdir) else named_weights(config.checkpoint.resume)
    corpus = _prepare(config, workdir, weights, quiet)
    devices = runtime.choose_devices(config)
    _on_first(workdir, lambda: workdirs.begun(workdir) and lock.take(workdir))
    changed = workdirs.check(workdir, config)  # again: until now another run may have been at work there
    metrics_file.check(workdir)
    _check_same_corpus(workdir, corpus, changed)
    _check_shared(workdir, "--workdir, as it was")
    returns = rollback.read(workdir) if workdirs.holds_checkpoints(workdir) else []
    distributed.check_same("what was done so far", {rollback.NAME: returns})
    order = train_order(corpus, config, returns, workdirs.order_version(workdir))
    model = make_model(config.model, corpus.vocab_size, config.seq_len)
    placement = Placement(config, devices)
    reporter = Reporter(config, quiet=quiet or jax.process_index() != 0)
    with reporter.phase("restoring" if workdirs.holds_checkpoints(workdir) else "making the initial state"):
        fresh = placement.initial(model)
        if weights:
            (state, said), start, damaged = start_from.state(config, weights, fresh), 0, []
        else:
            state, start, said, damaged = _load_state(config, workdir, placement, fresh)

    if returns and start == returns[-1].to:
        state = _counted_anew(state)
    rises, said_of_it = rewarm.of_run(config, workdir, start, rollback.lr_cuts(returns))

    def claim() -> None:
        facts = {"data_fingerprint": corpus.fingerprint, "vocab_size": corpus.vocab_size, "order": order.version}
        facts |= {"rewarm": rises._asdict()} if rises else {}
        workdirs.claim(workdir, config, facts, changed, lock)
        workdirs.put_aside(workdir, damaged)
        workdirs.save_tokenizer(workdir, corpus.tokenizer)

    _on_first(workdir, claim)
    _check_shared(workdir, "--workdir")

    saver = Saver(workdir, config.checkpoint, reporter.say)
    for line in (changed and f"changed since the last run: {changed}", said_of_it, *said):
        if line:
            reporter.say(line)
    parts = Parts(config, workdir, corpus, order, model, devices, placement, saver, reporter, returns, rises)
    return parts, state, start


def _prepare(config: Config, workdir: Path, weights: Weights | None, quiet: bool) -> data.Corpus:
    """The data. Raises UserError if it does not fit the weights to start from, or the samples' prompt."""
    if weights:
        start_from.check(config, weights)
    corpus = data.prepare(with_own_tokenizer(config, workdir), progress=not quiet)
    if weights:
        start_from.check_vocabulary(config, corpus, weights)
    _check_prompt(config, corpus)
    return corpus


def lr_history(parts: Parts) -> LrHistory:
    """What the learning rates depend on beside the configuration."""
    return LrHistory(parts.rewarm, rollback.lr_cuts(parts.returns))


def train_order(corpus: data.Corpus, config: Config, returns: list[rollback.Return], version: int) -> data.TrainOrder:
    """The order of the data, without the batches that the run steps over."""
    return data.TrainOrder(corpus, config, [(r.first, r.last) for r in returns], version)


def go_back(parts: Parts, trouble: rollback.Trouble) -> tuple[Parts, train_step.TrainState, int]:
    """Goes back to the last good checkpoint, removes later ones, and leaves out the batches of the bad steps.

    Returns:
      The parts, the state to go on from, and the number of its updates.

    Raises:
      Diverged: it went back `optim.max_returns` times already within the last rollback.SOON steps.
      CheckpointError: no checkpoint is whole.
    """
    c, workdir, returns = parts.config, parts.workdir, parts.returns
    with opened(workdir) as checkpoints:
        whole = _whole(checkpoints, len(returns)) if checkpoints else []
        if checkpoints is None or not whole:
            raise CheckpointError(f"{workdir / 'checkpoints'}: no whole checkpoint to go back to; {trouble.why}")
        to = rollback.target(whole, trouble.first, returns)
        first = max(trouble.first, to + 1)  # those before it are used up in that checkpoint
        last = max(trouble.last, first)  # where the only checkpoint is that of the bad step, the next batch is left out
        bad = int(parts.order.number(first)), int(parts.order.number(last))
        recent = rollback.recent(returns, to)
        if len(recent) >= c.optim.max_returns:
            batches = ", ".join(f"{a} to {b}" for a, b in [*((r.first, r.last) for r in recent), bad])
            raise rollback.Diverged(
                f"training diverged in step {trouble.last}: {trouble.why}; it went back {len(recent)} times"
                f" (optim.max_returns), in the end with {rollback.lr_scale(returns):.3g} times the learning rates; bad"
                f" were batches {batches}; the newest checkpoint is of step {max(whole)}; a lower optim.lr, more"
                " optim.warmup_steps, a smaller optim.clip_norm or optim.spike_factor, or model.qk_norm=true may help"
            )
        state = checkpoints.restore(to, parts.placement, parts.placement.initial(parts.model))
        later = [step for step in checkpoints.steps() if step > to]
    # The first return may have met a passing fault. When another one follows soon, the rates are likely to be too high.
    returns = [*returns, rollback.Return(to, *bad, trouble.why, c.optim.return_lr if recent else 1.0)]

    def keep() -> None:
        rollback.remove(workdir / "checkpoints", later)
        rollback.write(workdir, returns)

    _on_first(workdir, keep)
    scale = rollback.lr_scale(returns)
    rates = "the same learning rates" if scale == 1 else f"{scale:.3g} times the learning rates"
    parts.reporter.say(
        f"goes back to step {to}, without batches {bad[0]} to {bad[1]}, since {trouble.why}"
        f" (return {len(recent) + 1} of {c.optim.max_returns}); warms up again to"
        f" {rates}"
    )
    state = _counted_anew(state)
    saver = Saver(workdir, c.checkpoint, parts.reporter.say)
    order = train_order(parts.corpus, c, returns, parts.order.version)
    return parts._replace(saver=saver, order=order, returns=returns), state, to


def train_batches(config: Config, order: data.TrainOrder, placement: Placement, start: int) -> data.TrainStream:
    """The batches that this process trains on, from the one after `start` updates."""
    return data.train_stream(
        order,
        config,
        start,
        num_devices=len(placement.local),
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )


def eval_batches(parts: Parts) -> Iterator[data.Scored]:
    """This process's part of the validation set, in batches as large as a micro-batch of training."""
    c = parts.config
    return data.eval_batches(
        parts.corpus, c, c.batch_size // c.optim.accum_steps, num_devices=len(parts.placement.local),
        process_index=jax.process_index(), process_count=jax.process_count(), limit=c.eval.batches,
    )  # fmt: skip


def _load_state(
    config: Config, workdir: Path, placement: Placement, fresh: train_step.TrainState
) -> tuple[train_step.TrainState, int, list[str], list[int]]:
    """The state of the newest whole checkpoint; fresh where there is none.

    Returns:
      The state, the number of its updates, what there is to say about it, and the steps whose checkpoints are damaged.
    """
    with opened(workdir) as checkpoints:
        if checkpoints is None or not checkpoints.steps():
            return fresh, 0, [], []
        newest, damage = find_whole(checkpoints)
        if newest > config.steps:
            raise UserError(f"steps is {config.steps}; allowed: at least {newest}, the steps already done in {workdir}")
        said = [f"{reason}: put aside as {step}.damaged" for step, reason in damage.items()]
        return checkpoints.restore(newest, placement, fresh), newest, said, list(damage)


def _counted_anew(state: train_step.TrainState) -> train_step.TrainState:
    """The state without bad steps in a row: after a return they are counted from there."""
    return state._replace(guard=state.guard._replace(in_row=state.guard.in_row * 0, high=state.guard.high * 0))


def _whole(checkpoints: Checkpoints, time: int) -> list[int]:
    def find() -> str:
        return json.dumps([step for step in checkpoints.steps() if checkpoints.damage(step) is None])

    return json.loads(distributed.of_first(f"the whole checkpoints ({time})", find))


def _on_first(workdir: Path, act: Callable[[], Any]) -> None:
    """Acts on the first process. All wait for it, and all raise UserError if it does."""

    def attempt() -> str:
        try:
            act()
        except UserError as error:
            return str(error)
        return ""

    if refusal := distributed.of_first("the preparation of its workdir", attempt):
        raise UserError(refusal)


def _check_prompt(config: Config, corpus: data.Corpus) -> None:
    """Raises UserError if the tokenizer does not know the samples' prompt: now, not after hours of training."""
    if corpus.tokenizer is None or not config.eval.sample_tokens:
        return
    try:
        encode_prompt(corpus.tokenizer, config.data, config.eval.sample_prompt, trains_on_answers(config.data))
    except UserError as error:
        prompt = config.eval.sample_prompt
        raise UserError(f"eval.sample_prompt is {prompt!r}: {error}; or eval.sample_tokens=0") from error


def _check_shared(workdir: Path, what: str) -> None:
    """Raises UserError, on all hosts, unless the workdir is one folder that all of them see."""

    def seen() -> str:
        try:
            return hashlib.sha256((workdir / "config.json").read_bytes()).hexdigest()[:12]
        except OSError:
            return "not there"

    wanted, deadline = distributed.of_first(what, seen), time.monotonic() + FOLDER_LIMIT
    while seen() != wanted and time.monotonic() < deadline:  # a network's file system may show it late
        time.sleep(0.5)
    distributed.check_same(f"{what}: a folder that all hosts see", {"config.json": seen()})


def _check_same_corpus(workdir: Path, corpus: data.Corpus, changed: str | None) -> None:
    """Raises UserError if the run in this workdir was trained on other data: its steps would mean something else.

    Args:
      changed: which keys have changed since, for the message.
    """
    distributed.check_same("the data", {"fingerprint": corpus.fingerprint, "vocab_size": corpus.vocab_size})
    if not workdirs.holds_checkpoints(workdir):
        return
    facts = workdirs.read_facts(workdir)
    before = facts["data_fingerprint"]
    if before != corpus.fingerprint:
        keys = f"; {changed}" if changed else ""
        raise UserError(
            f"--workdir {workdir}: the data has changed since this run began (fingerprint {before}, now"
            f" {corpus.fingerprint}{keys}); allowed: the same data, or another workdir (checkpoint.resume=PATH takes"
            " weights from this one)"
        )
    if facts["vocab_size"] != corpus.vocab_size:
        raise UserError(
            f"{workdir / 'config.json'}: vocab_size is {facts['vocab_size']}; allowed: that of its data,"
            f" {corpus.vocab_size}"
        )
    folder = workdir / "tokenizer"
    if folder.exists() and not workdirs.holds_tokenizer(workdir, corpus.tokenizer):
        raise UserError(f"{folder}: not the tokenizer of this run's data; allowed: as the run wrote it, or no folder")
