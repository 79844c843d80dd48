"""What a run is made of, put together from its configuration: data, model, devices, state."""

import importlib.util
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxlm import data, runtime
from jaxlm import step as steps
from jaxlm import workdir as workdirs
from jaxlm.checkpoint import Checkpointer, place
from jaxlm.config import Config, UserError
from jaxlm.console import Reporter
from jaxlm.model import Model, make_model
from jaxlm.step import Device


class Parts(NamedTuple):
    config: Config
    workdir: Path
    corpus: data.Corpus
    model: Model
    devices: list[Device]  # of all processes
    local: list[Device]  # of this one
    sharding: NamedSharding  # of a batch over the local devices
    checkpoints: Checkpointer
    reporter: Reporter


def build(config: Config, workdir: Path, quiet: bool = False) -> tuple[Parts, steps.TrainState, int]:
    """The parts, the state to go on from, and the number of its updates.

    Nothing is written before data, workdir, devices and checkpoint are known to fit the configuration.

    Raises:
      UserError: they do not.
      CheckpointError: there is a checkpoint, and it cannot be used.
    """
    changed = workdirs.check(workdir, config)
    if config.log.wandb and importlib.util.find_spec("wandb") is None:
        raise UserError("log.wandb is True; allowed: false, or the package: pip install 'jaxlm[wandb]'")
    corpus = data.prepare(config, progress=not quiet)
    _check_prompt(config, corpus)
    devices = runtime.choose_devices(config)
    _check_same_corpus(workdir, corpus)
    local = [d for d in devices if d.process_index == jax.process_index()]
    model = make_model(config.model, corpus.vocab_size, config.seq_len)
    fresh = place(steps.init_state(config, model, len(local)), local)
    state, start, origin = _load_state(config, workdir, fresh)

    first = jax.process_index() == 0
    if first:
        facts = {"data_fingerprint": corpus.fingerprint, "vocab_size": corpus.vocab_size}
        workdirs.claim(workdir, config, facts, changed)
        _save_tokenizer(corpus, workdir)
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("workdir")

    sharding = NamedSharding(Mesh(np.array(local), (steps.AXIS,)), PartitionSpec(steps.AXIS))
    checkpoints = Checkpointer(workdir, config.checkpoint)
    reporter = Reporter(config.steps, start, quiet=quiet or not first)
    for line in (changed and f"changed since the last run: {changed}", origin):
        if line:
            reporter.say(line)
    return Parts(config, workdir, corpus, model, devices, local, sharding, checkpoints, reporter), state, start


def train_batches(parts: Parts, start: int) -> data.TrainStream:
    """The batches that this process trains on, from the one after `start` updates."""
    return data.train_stream(
        parts.corpus, parts.config, start, num_devices=len(parts.local),
        process_index=jax.process_index(), process_count=jax.process_count(),
    )  # fmt: skip


def eval_batches(parts: Parts) -> Iterator[dict[str, np.ndarray]]:
    """This process's part of the validation set, in batches as large as a micro-batch of training."""
    c = parts.config
    return data.eval_batches(
        parts.corpus.val, c, c.batch_size // c.optim.accum_steps, num_devices=len(parts.local),
        process_index=jax.process_index(), process_count=jax.process_count(), limit=c.eval.batches,
    )  # fmt: skip


def _load_state(config: Config, workdir: Path, fresh: steps.TrainState) -> tuple[steps.TrainState, int, str | None]:
    """The newest checkpoint's state; else fresh, with the weights that `checkpoint.resume` names.

    Returns:
      The state, the number of its updates, and a line about where other weights come from.
    """
    resume = config.checkpoint.resume
    with _opened(workdir, config) as checkpoints:
        newest = checkpoints.latest() if checkpoints else None
        if checkpoints and newest is not None:
            if newest > config.steps:
                raise UserError(
                    f"steps is {config.steps}; allowed: at least {newest}, the steps already done in {workdir}"
                )
            return checkpoints.restore(newest, like=fresh), newest, None
    if resume in ("auto", "never"):
        return fresh, 0, None
    with _opened(Path(resume), config) as checkpoints:
        step = checkpoints.latest() if checkpoints else None
        if checkpoints is None or step is None:
            raise UserError(
                f"checkpoint.resume is '{resume}'; allowed: auto, never, or a workdir with a whole checkpoint"
            )
        params = checkpoints.restore_params(step)
    here, there = _shapes(fresh.params), _shapes(params)
    if here != there:
        key = next(k for k in sorted(here.keys() | there.keys()) if here.get(k) != there.get(k))
        raise UserError(f"checkpoint.resume is '{resume}'; its {key} is {there.get(key)}, this model's {here.get(key)}")
    params = jax.tree.map(lambda p, x: jax.device_put(np.asarray(x, p.dtype), p.sharding), fresh.params, params)
    state = fresh._replace(
        params=params, ema=None if fresh.ema is None else jax.tree.map(jnp.copy, steps.float32(params))
    )
    return state, 0, f"starts from the weights of step {step} in {resume}"


@contextmanager
def _opened(workdir: Path, config: Config) -> Iterator[Checkpointer | None]:
    """The checkpoints of a workdir, to be read; None where there are none."""
    if not workdirs.holds_checkpoints(workdir):
        yield None
        return
    checkpoints = Checkpointer(workdir, config.checkpoint, read_only=True)
    try:
        yield checkpoints
    finally:
        checkpoints.close()


def _shapes(params: Any) -> dict[str, tuple[int, ...]]:
    return {"/".join(k.key for k in path): x.shape for path, x in jax.tree_util.tree_flatten_with_path(params)[0]}


def _save_tokenizer(corpus: data.Corpus, workdir: Path) -> None:
    """The tokenizer travels with the workdir."""
    if corpus.tokenizer is None or (workdir / "tokenizer").exists():
        return
    temporary = workdir / "tokenizer.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    corpus.tokenizer.save(temporary)
    temporary.rename(workdir / "tokenizer")


def _check_prompt(config: Config, corpus: data.Corpus) -> None:
    """Raises UserError if the tokenizer does not know the samples' prompt: now, not after hours of training."""
    if corpus.tokenizer is None or not config.eval.sample_tokens:
        return
    try:
        corpus.tokenizer.encode([config.eval.sample_prompt])
    except UserError as error:
        prompt = config.eval.sample_prompt
        raise UserError(f"eval.sample_prompt is {prompt!r}: {error}; or eval.sample_tokens=0") from error


def _check_same_corpus(workdir: Path, corpus: data.Corpus) -> None:
    """Raises UserError if the run in this workdir was trained on other data: its steps would mean something else."""
    if not workdirs.holds_checkpoints(workdir):
        return
    before = workdirs.read_facts(workdir).get("data_fingerprint")
    if before != corpus.fingerprint:
        raise UserError(
            f"--workdir {workdir}: the data has changed since this run began (fingerprint {before}, now"
            f" {corpus.fingerprint}); allowed: the same data, or another workdir (checkpoint.resume=PATH takes weights"
            " from this one)"
        )
