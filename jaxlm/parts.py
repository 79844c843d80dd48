"""What a run is made of, put together from its configuration: data, model, devices, state."""

import shutil
from collections.abc import Iterator
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

    Nothing is written before data, workdir and devices are known to fit the configuration.

    Raises:
      UserError: they do not.
      CheckpointError: there is a checkpoint, and it cannot be used.
    """
    changed = workdirs.check(workdir, config)
    corpus = data.prepare(config, progress=not quiet)
    devices = runtime.choose_devices(config)
    _check_same_corpus(workdir, corpus)
    first = jax.process_index() == 0
    if first:
        facts = {"data_fingerprint": corpus.fingerprint, "vocab_size": corpus.vocab_size}
        workdirs.claim(workdir, config, facts, changed)
        _save_tokenizer(corpus, workdir)
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("workdir")

    local = [d for d in devices if d.process_index == jax.process_index()]
    sharding = NamedSharding(Mesh(np.array(local), (steps.AXIS,)), PartitionSpec(steps.AXIS))
    model = make_model(config.model, corpus.vocab_size, config.seq_len)
    checkpoints = Checkpointer(workdir, config.checkpoint)
    start = checkpoints.latest() or 0
    reporter = Reporter(config.steps, start, quiet=quiet or not first)
    if changed:
        reporter.say(f"changed since the last run: {changed}")
    parts = Parts(config, workdir, corpus, model, devices, local, sharding, checkpoints, reporter)
    return parts, _load_state(parts, place(steps.init_state(config, model, len(local)), local)), start


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


def _load_state(parts: Parts, fresh: steps.TrainState) -> steps.TrainState:
    """The newest checkpoint's state; else fresh, with the weights that `checkpoint.resume` names."""
    newest, resume = parts.checkpoints.latest(), parts.config.checkpoint.resume
    if newest is not None:
        if newest > parts.config.steps:
            raise UserError(
                f"steps is {parts.config.steps}; allowed: at least {newest}, the steps already done in {parts.workdir}"
            )
        return parts.checkpoints.restore(newest, like=fresh)
    if resume in ("auto", "never"):
        return fresh
    params, step = _weights_of(Path(resume), parts)
    here, there = _shapes(fresh.params), _shapes(params)
    if here != there:
        key = next(k for k in sorted(here.keys() | there.keys()) if here.get(k) != there.get(k))
        raise UserError(f"checkpoint.resume is '{resume}'; its {key} is {there.get(key)}, this model's {here.get(key)}")
    parts.reporter.say(f"starts from the weights of step {step} in {resume}")
    params = jax.tree.map(lambda p, x: jax.device_put(np.asarray(x, p.dtype), p.sharding), fresh.params, params)
    return fresh._replace(params=params, ema=None if fresh.ema is None else jax.tree.map(jnp.copy, params))


def _weights_of(workdir: Path, parts: Parts) -> tuple[Any, int]:
    if not (workdir / "checkpoints").is_dir():
        raise UserError(f"checkpoint.resume is '{workdir}'; allowed: auto, never, or a workdir that holds checkpoints")
    other = Checkpointer(workdir, parts.config.checkpoint, read_only=True)
    step = other.latest()
    if step is None:
        raise UserError(f"checkpoint.resume is '{workdir}'; there is no whole checkpoint in it")
    params = other.restore_params(step)
    other.close()
    return params, step


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


def _check_same_corpus(workdir: Path, corpus: data.Corpus) -> None:
    """Raises UserError if the run in this workdir was trained on other data: its steps would mean something else."""
    if not (workdir / "checkpoints").exists():
        return
    before = workdirs.read_facts(workdir).get("data_fingerprint")
    if before != corpus.fingerprint:
        raise UserError(
            f"--workdir {workdir}: the data has changed since this run began (fingerprint {before}, now"
            f" {corpus.fingerprint}); allowed: the same data, or another workdir (checkpoint.resume=PATH takes weights"
            " from this one)"
        )
