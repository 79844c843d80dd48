"""A finished or running run, opened to sample from it or to score it."""

from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxlm import data, runtime
from jaxlm import step as steps
from jaxlm import workdir as workdirs
from jaxlm.checkpoint import Checkpointer
from jaxlm.cli import load_workdir
from jaxlm.config import Config, UserError
from jaxlm.evaluate import evaluate
from jaxlm.model import Model, Params, make_model


class Run(NamedTuple):
    folder: Path
    config: Config
    step: int
    model: Model
    params: Params  # the moving average where there is one; NumPy arrays
    tokenizer: data.Tokenizer | None


def open_run(workdir: Path, step: int | None) -> Run:
    """The run in `workdir` at `step`, the newest checkpoint if None.

    Raises:
      UserError: it is not a run, or has no such checkpoint.
      CheckpointError: the checkpoint cannot be read.
    """
    config = load_workdir(workdir)
    if not workdirs.holds_checkpoints(workdir):
        raise UserError(f"--workdir {workdir}: no checkpoints in it yet")
    checkpoints = Checkpointer(workdir, config.checkpoint, read_only=True)
    there = checkpoints.steps()
    if not there:
        raise UserError(f"--workdir {workdir}: no whole checkpoint in it yet")
    step = there[-1] if step is None else step
    if step not in there:
        raise UserError(f"--step is {step}; allowed: one of {', '.join(map(str, there))}")
    params = checkpoints.restore_params(step)
    checkpoints.close()
    folder = workdir / "tokenizer"
    tokenizer = data.load_tokenizer(folder) if folder.exists() else None
    vocab_size = workdirs.read_facts(workdir)["vocab_size"]
    return Run(workdir, config, step, make_model(config.model, vocab_size, config.seq_len), params, tokenizer)


def score(run: Run, config: Config) -> dict[str, Any]:
    """The scores of a run on the validation data of `config`, tokenized with the run's own tokenizer."""
    if config.data != run.config.data and run.tokenizer is not None:
        config.data.tokenizer_path = str(run.folder / "tokenizer")
    corpus = data.prepare(config)
    devices = runtime.choose_devices(config)
    mesh = Mesh(np.array(devices), (steps.AXIS,))
    params = jax.device_put(run.params, NamedSharding(mesh, PartitionSpec()))
    batches = data.eval_batches(
        corpus.val, config, config.batch_size // config.optim.accum_steps, num_devices=len(devices),
        process_index=0, process_count=1, limit=config.eval.batches,
    )  # fmt: skip
    eval_step = steps.pmap_eval_step(steps.make_eval_step(config, run.model), devices)
    return evaluate(eval_step, params, batches, corpus.bytes_per_token)
