"""Opens a run, finished or not, to sample from it or to score it."""

import math
import sys
from pathlib import Path
from typing import Any, NamedTuple

from jaxlm import data
from jaxlm.checkpoint import workdirs
from jaxlm.checkpoint.metrics_file import validation_losses
from jaxlm.checkpoint.reading import CheckpointError, Checkpoints, shapes
from jaxlm.checkpoint.rollback import Diverged
from jaxlm.config import SOURCES, Config, UserError
from jaxlm.config.files import load_workdir, read_config
from jaxlm.config.pretrained import Step
from jaxlm.host import runtime
from jaxlm.model import Model, Params, make_model
from jaxlm.run.evaluation import make_score
from jaxlm.run.phases import Phases
from jaxlm.run.setup import set_up


class Run(NamedTuple):
    """A run at one of its checkpoints."""

    folder: Path
    config: Config
    step: int
    model: Model
    vocab_size: int
    params: Params  # NumPy arrays; the moving average if the run has one
    tokenizer: data.Tokenizer | None


def open_run(workdir: Path, step: Step) -> Run:
    """Opens the run in `workdir` at `step`: a number, "best" by validation loss, or None for the newest.

    Raises:
      UserError: the folder is not a run, or has no such checkpoint.
      CheckpointError: the checkpoint cannot be read.
    """
    runtime.find_devices()
    config = load_workdir(workdir)
    path = workdir / "config.json"
    if gained := read_config(path)[1]:
        keys = ", ".join(f"{key}={value!r}" for key, value in gained.items())
        print(f"{path}: written by an older jaxlm, without {keys}", file=sys.stderr)
    vocab_size = workdirs.read_facts(workdir)["vocab_size"]
    if not workdirs.holds_checkpoints(workdir):
        raise UserError(f"--workdir {workdir}: no checkpoints in it yet")
    checkpoints = Checkpoints(workdir)
    if not checkpoints.steps():
        raise UserError(f"--workdir {workdir}: no whole checkpoint in it yet")
    losses = validation_losses(workdir)
    checkpoints.check_step(f"--step {step}", step, losses)
    found, damage = checkpoints.find_whole(step, losses)
    if isinstance(step, int) and found is None:
        raise CheckpointError(damage[step])
    if found is None:
        raise CheckpointError(f"{next(iter(damage.values()))}; none of the {len(damage)} checkpoints is whole")
    for reason in damage.values():
        print(f"{reason}: {'an older' if step is None else 'another'} checkpoint is taken", file=sys.stderr)
    with Phases(stderr=True).phase("restoring"):
        params = checkpoints.restore_params(found)
    checkpoints.close()
    model = make_model(config.model, vocab_size, config.seq_len)
    want, got = shapes(model.shapes()), shapes(params)
    if wrong := sorted(key for key in want.keys() | got.keys() if want.get(key) != got.get(key)):
        key = wrong[0]
        raise UserError(f"{path}: not of this checkpoint: {key} would be {want.get(key)} and is {got.get(key)}")
    folder = workdir / "tokenizer"
    tokenizer = data.load_tokenizer(folder) if folder.exists() else None
    return Run(workdir, config, found, model, vocab_size, params, tokenizer)


def score(run: Run, config: Config) -> dict[str, Any]:
    """Returns the scores of a run on the validation data of `config`, tokenized with the run's own tokenizer.

    Raises:
      UserError: the data has another vocabulary.
      Diverged: the loss is not finite.
    """
    kind = SOURCES[config.data.source]
    ids = kind.ids and kind.files
    if config.data != run.config.data and run.tokenizer is not None:
        config.data.tokenizer_path = str(run.folder / "tokenizer")
        if ids:
            config.data.vocab_size = run.vocab_size
    corpus = data.prepare(config)
    bare = ids and corpus.tokenizer is None  # nothing says what these ids stand for
    same = bare or workdirs.holds_tokenizer(run.folder, corpus.tokenizer)
    if corpus.vocab_size != run.vocab_size or not same:
        raise UserError(
            f"data.source is {config.data.source!r}: its {corpus.vocab_size} token ids are not those of the run, which"
            f" has {run.vocab_size}; allowed: data in the vocabulary of {run.folder}"
        )
    setup = set_up(config, corpus)
    scores = make_score(setup, Phases(stderr=True))(setup.placement.place_params(run.params))
    if not math.isfinite(scores["eval_loss"]):
        raise Diverged(f"the validation loss of step {run.step} in {run.folder} is {scores['eval_loss']}")
    return scores
