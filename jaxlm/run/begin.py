"""Begins or continues a run in its workdir: checks that everything fits, claims the folder, restores the state."""

import hashlib
import importlib.util
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax

from jaxlm import data
from jaxlm.checkpoint import metrics_file, rewarm, rollback, start_from, workdirs
from jaxlm.checkpoint.start_from import find_whole, opened
from jaxlm.checkpoint.writing import Saver
from jaxlm.config import Config, UserError
from jaxlm.config.pretrained import Weights, named_weights, with_own_tokenizer
from jaxlm.data.prompts import encode_prompt
from jaxlm.data.sources.conversations import trains_on_answers
from jaxlm.host import distributed
from jaxlm.plan.memory import check_fits
from jaxlm.run.console import Reporter
from jaxlm.run.setup import Setup, set_up
from jaxlm.train.schedules import LrHistory, Rewarm
from jaxlm.train.step import TrainState

FOLDER_LIMIT = 60  # seconds until a network file system shows what another host has written


@dataclass(frozen=True)
class Parts(Setup):
    """The parts of a run: its setup, and what belongs to its workdir."""

    workdir: Path
    order: data.TrainOrder
    saver: Saver
    reporter: Reporter
    returns: list[rollback.Return]  # to earlier checkpoints, in the run so far
    rewarm: Rewarm | None  # the second warmup of a run that continued at a higher learning rate

    def lr_history(self) -> LrHistory:
        return LrHistory(self.rewarm, rollback.lr_cuts(self.returns))


def begin(config: Config, workdir: Path, lock: workdirs.Lock, quiet: bool = False) -> tuple[Parts, TrainState, int]:
    """Returns the parts of the run, the state to continue from, and the number of its updates.

    Writes nothing before data, workdir, devices and checkpoint are known to fit the configuration. From then on, the
    first process holds the workdir's lock.

    Raises:
      UserError: one of them does not fit.
      CheckpointError: there is a checkpoint, and it cannot be used.
    """
    workdirs.check(workdir, config)
    if config.log.wandb and importlib.util.find_spec("wandb") is None:
        raise UserError("log.wandb is True; allowed: false, or the package: pip install wandb")
    weights = None if workdirs.holds_checkpoints(workdir) else named_weights(config.checkpoint.resume)
    corpus = _prepare(config, workdir, weights, quiet)
    setup = set_up(config, corpus)
    check_fits(config, setup.model, setup.devices)
    on_first(lambda: workdirs.begun(workdir) and lock.take(workdir))
    changed = workdirs.check(workdir, config)  # again: another run may have worked there until now
    metrics_file.check(workdir)
    _check_same_corpus(workdir, corpus, changed)
    _check_shared(workdir, "--workdir, as it was")
    returns = rollback.read(workdir) if workdirs.holds_checkpoints(workdir) else []
    distributed.check_same("what was done so far", {rollback.NAME: returns})
    order = train_order(corpus, config, returns, workdirs.order_version(workdir))
    reporter = Reporter(config, quiet=quiet or jax.process_index() != 0)
    with reporter.phase("restoring" if workdirs.holds_checkpoints(workdir) else "making the initial state"):
        state, start, damaged, lines = _first_state(setup, workdir, weights)
    if returns and start == returns[-1].to:
        state = restart_counts(state)
    second_warmup, line = rewarm.of_run(config, workdir, start, rollback.lr_cuts(returns))

    def claim() -> None:
        facts = {"data_fingerprint": corpus.fingerprint, "vocab_size": corpus.vocab_size, "order": order.version}
        facts |= {"rewarm": second_warmup._asdict()} if second_warmup else {}
        workdirs.claim(workdir, config, facts, changed, lock)
        workdirs.put_aside(workdir, damaged)
        workdirs.save_tokenizer(workdir, corpus.tokenizer)

    on_first(claim)
    _check_shared(workdir, "--workdir")
    saver = Saver(workdir, config.checkpoint, reporter.say)
    for text in (changed and f"changed since the last run: {changed}", line, *lines):
        if text:
            reporter.say(text)
    parts = Parts(
        **vars(setup),
        workdir=workdir,
        order=order,
        saver=saver,
        reporter=reporter,
        returns=returns,
        rewarm=second_warmup,
    )
    return parts, state, start


def train_order(corpus: data.Corpus, config: Config, returns: list[rollback.Return], version: int) -> data.TrainOrder:
    """The order of the training data, without the batches that the run leaves out."""
    return data.TrainOrder(corpus, config, [(r.first, r.last) for r in returns], version)


def restart_counts(state: TrainState) -> TrainState:
    """The state with its counts of bad steps in a row at zero: after a return, counting starts again."""
    return state._replace(guard=state.guard._replace(in_row=state.guard.in_row * 0, high=state.guard.high * 0))


class _First(NamedTuple):
    state: TrainState
    step: int  # updates done
    damaged: list[int]  # steps of damaged checkpoints
    lines: list[str]  # to print


def _first_state(setup: Setup, workdir: Path, weights: Weights | None) -> _First:
    """The state that this run continues from: its newest whole checkpoint, other weights, or the initial state."""
    fresh = setup.placement.initial()
    if weights:
        state, lines = start_from.state(setup.config, weights, setup.placement, fresh)
        return _First(state, 0, [], lines)
    with opened(workdir) as checkpoints:
        if checkpoints is None or not checkpoints.steps():
            return _First(fresh, 0, [], [])
        newest, damage = find_whole(checkpoints)
        if newest > setup.config.steps:
            raise UserError(
                f"steps is {setup.config.steps}; allowed: at least {newest}, the steps already done in {workdir}"
            )
        lines = [f"{reason}: put aside as {step}.damaged" for step, reason in damage.items()]
        return _First(checkpoints.restore(newest, setup.placement, fresh), newest, list(damage), lines)


def _prepare(config: Config, workdir: Path, weights: Weights | None, quiet: bool) -> data.Corpus:
    """The data. Raises UserError if it does not fit the weights to start from, or the prompt of the samples."""
    if weights:
        start_from.check(config, weights)
    corpus = data.prepare(with_own_tokenizer(config, workdir), progress=not quiet)
    if weights:
        start_from.check_vocabulary(config, corpus, weights)
    _check_prompt(config, corpus)
    return corpus


def _check_prompt(config: Config, corpus: data.Corpus) -> None:
    """Raises UserError now, and not after hours of training, if the tokenizer cannot encode the samples' prompt."""
    if corpus.tokenizer is None or not config.eval.sample_tokens:
        return
    try:
        encode_prompt(corpus.tokenizer, config.data, config.eval.sample_prompt, trains_on_answers(config.data))
    except UserError as error:
        prompt = config.eval.sample_prompt
        raise UserError(f"eval.sample_prompt is {prompt!r}: {error}; or eval.sample_tokens=0") from error


def on_first(act: Callable[[], Any]) -> None:
    """Calls `act` on the first process. All processes wait for it, and all raise UserError if it does."""

    def attempt() -> str:
        try:
            act()
        except UserError as error:
            return str(error)
        return ""

    if refusal := distributed.from_first("the preparation of its workdir", attempt):
        raise UserError(refusal)


def _check_shared(workdir: Path, what: str) -> None:
    """Raises UserError, on all hosts, unless the workdir is one folder that all of them see."""

    def seen() -> str:
        try:
            return hashlib.sha256((workdir / "config.json").read_bytes()).hexdigest()[:12]
        except OSError:
            return "not there"

    wanted, deadline = distributed.from_first(what, seen), time.monotonic() + FOLDER_LIMIT
    while seen() != wanted and time.monotonic() < deadline:  # a network file system may show it late
        time.sleep(0.5)
    distributed.check_same(f"{what}: a folder that all hosts see", {"config.json": seen()})


def _check_same_corpus(workdir: Path, corpus: data.Corpus, changed: str | None) -> None:
    """Raises UserError if the run in this workdir was trained on other data, which its steps so far refer to.

    Args:
      changed: the keys that have changed since then, for the message.
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
