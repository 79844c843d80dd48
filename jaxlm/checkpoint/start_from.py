"""Starts a run from the weights of another one, after checking that they fit the configuration and its data."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm import data
from jaxlm.checkpoint import workdirs
from jaxlm.checkpoint.metrics_file import validation_losses
from jaxlm.checkpoint.reading import CheckpointError, Checkpoints, shapes
from jaxlm.config import Config, UserError
from jaxlm.config.files import load_workdir
from jaxlm.config.paths import holds_checkpoints
from jaxlm.config.pretrained import Step, Weights, brought_by, check_asked
from jaxlm.host import distributed
from jaxlm.model import lora
from jaxlm.train import step as train_step
from jaxlm.train import trained
from jaxlm.train.placement import Placement


def check(config: Config, weights: Weights) -> None:
    """Raises UserError, before any data is tokenized, if the configuration does not fit these weights."""
    run, folder = load_workdir(weights.workdir), weights.workdir / "tokenizer"
    brought = brought_by(weights.workdir, run, workdirs.read_facts(weights.workdir)["vocab_size"])
    check_asked(config, brought, set(brought), run, weights.workdir)
    d = config.data
    if folder.is_dir():
        own = not d.tokenizer_path or Path(d.tokenizer_path).expanduser().resolve() == folder.resolve()
        other = None if own else data.load_tokenizer(d.tokenizer_path)
        if other and not workdirs.holds_tokenizer(weights.workdir, other):
            raise UserError(
                f"data.tokenizer_path is {d.tokenizer_path!r}; allowed: '{folder}' or a copy of it, the"
                " tokenizer of the weights that checkpoint.resume takes"
            )


def check_vocabulary(config: Config, corpus: data.Corpus, weights: Weights) -> None:
    """Raises UserError if the token ids of the corpus are not those that the weights were trained on."""
    vocab_size = workdirs.read_facts(weights.workdir)["vocab_size"]
    either_bare = corpus.tokenizer is None or not (weights.workdir / "tokenizer").is_dir()
    if corpus.vocab_size != vocab_size or not (
        either_bare or workdirs.holds_tokenizer(weights.workdir, corpus.tokenizer)
    ):
        raise UserError(
            f"data.source is {config.data.source!r}: its {corpus.vocab_size} token ids are not those of"
            f" {weights.workdir}, which has {vocab_size}; allowed: data in the vocabulary of the weights"
            " that checkpoint.resume takes"
        )


def state(
    config: Config, weights: Weights, placement: Placement, fresh: train_step.TrainState
) -> tuple[train_step.TrainState, list[str]]:
    """Returns the fresh state with the parameters of a checkpoint, or their moving average if it has one, and lines to
    print.
    """
    resume = config.checkpoint.resume
    with opened(weights.workdir) as checkpoints:
        if checkpoints is None or not checkpoints.steps():
            raise UserError(
                f"checkpoint.resume is '{resume}'; allowed: auto, never, or a workdir with a whole checkpoint"
            )
        losses = validation_losses(weights.workdir)
        checkpoints.check_step(f"checkpoint.resume is '{resume}'", weights.step, losses)
        step, damage = find_whole(checkpoints, weights.step, losses)
        params = lora.merged(load_workdir(weights.workdir).model, checkpoints.restore_params(step))
    whole = placement.whole.params
    here, there = shapes(lora.without(whole)), shapes(params)
    if here != there:
        key = next(k for k in sorted(here.keys() | there.keys()) if here.get(k) != there.get(k))
        raise UserError(f"checkpoint.resume is '{resume}'; its {key} is {there.get(key)}, this model's {here.get(key)}")
    for x in jax.tree.leaves(trained.within(fresh.params, params)):
        x.delete()  # both might not fit
    dtypes = trained.within(whole, params)
    new = placement.place_params(jax.tree.map(lambda x, like: np.asarray(x, like.dtype), params, dtypes))
    params = trained.joined(fresh.params, new)
    ema = None if fresh.ema is None else jax.tree.map(jnp.copy, train_step.float32(trained.part(config, params)))
    lines = [*damage.values(), f"starts from the weights of step {step} in {weights.workdir}"]
    return fresh._replace(params=params, ema=ema), lines


def find_whole(
    checkpoints: Checkpoints, step: Step = None, losses: dict[int, float] | None = None
) -> tuple[int, dict[int, str]]:
    """Returns on all processes what `Checkpoints.find_whole` finds on the first one.

    Raises:
      CheckpointError: no checkpoint is whole.
    """
    found = distributed.from_first("a whole checkpoint", lambda: json.dumps(checkpoints.find_whole(step, losses or {})))
    whole, damage = json.loads(found)
    if whole is None:
        raise CheckpointError(f"{next(iter(damage.values()))}; none of its {len(damage)} checkpoints is whole")
    return whole, {int(k): v for k, v in damage.items()}


@contextmanager
def opened(workdir: Path) -> Iterator[Checkpoints | None]:
    """Opens a workdir's checkpoints for reading; yields None if there are none."""
    if not holds_checkpoints(workdir):
        yield None
        return
    checkpoints = Checkpoints(workdir)
    try:
        yield checkpoints
    finally:
        checkpoints.close()
