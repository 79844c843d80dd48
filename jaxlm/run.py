"""A run from its configuration to its last line: builds the parts, hangs the hooks on the loop, says what comes out."""

import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxlm import data, metrics, runtime, workdir as workdirs
from jaxlm import step as steps
from jaxlm.checkpoint import Checkpointer, place
from jaxlm.config import Config, UserError
from jaxlm.console import Reporter, human
from jaxlm.evaluate import evaluate
from jaxlm.generate import generate
from jaxlm.model import Model, flops_per_token, make_model, num_params
from jaxlm.train import Done, train

STOPPED = 75  # exit code: stopped by a signal after saving


class Parts(NamedTuple):
    """What a run is made of."""

    config: Config
    workdir: Path
    corpus: data.Corpus
    model: Model
    devices: list[jax.Device]  # of all processes
    local: list[jax.Device]  # of this one
    sharding: NamedSharding  # of a batch over the local devices
    checkpoints: Checkpointer
    reporter: Reporter


def run(config: Config, workdir: Path) -> int:
    """Trains; returns the exit code.

    Raises:
      UserError: data, workdir or devices do not fit the configuration.
      CheckpointError: there is a checkpoint, and it cannot be used.
    """
    stop = StopSignal()
    changed = workdirs.check(workdir, config)
    corpus = data.prepare(config)
    devices = runtime.choose_devices(config)
    check_same_corpus(workdir, corpus)
    first = jax.process_index() == 0
    if first:
        workdirs.claim(workdir, config, {"data_fingerprint": corpus.fingerprint, "vocab_size": corpus.vocab_size}, changed)
        save_tokenizer(corpus, workdir)
    wait_for_all("workdir")

    local = [d for d in devices if d.process_index == jax.process_index()]
    sharding = NamedSharding(Mesh(np.array(local), (steps.AXIS,)), PartitionSpec(steps.AXIS))
    model = make_model(config.model, corpus.vocab_size, config.seq_len)
    checkpoints = Checkpointer(workdir, config.checkpoint)
    start = checkpoints.latest() or 0
    reporter = Reporter(config.steps, start, quiet=not first)
    parts = Parts(config, workdir, corpus, model, devices, local, sharding, checkpoints, reporter)
    if changed:
        reporter.say(f"changed since the last run: {changed}")
    state = place(steps.init_state(config, model, len(local)), local)
    state = load_state(parts, state)
    describe(parts, state, start)
    return go(parts, state, start, stop)


def go(parts: Parts, state: steps.TrainState, start: int, stop: "StopSignal") -> int:
    """The loop with its hooks, and the end."""
    config, reporter, checkpoints = parts.config, parts.reporter, parts.checkpoints
    write = make_writer(parts, start)
    evaluation = make_evaluation(parts, write)
    scores: dict[int, dict[str, Any]] = {}  # of evaluated steps

    def run_evaluation(step: int, state: steps.TrainState) -> None:
        scores[step] = evaluation(step, state)

    def save(step: int, state: steps.TrainState) -> None:
        checkpoints.save(step, state, scores[step]["eval_loss"] if step in scores else None)

    def every(period: int) -> Callable[[int], bool]:
        return lambda step: step == config.steps or (period > 0 and step % period == 0)

    if checkpoints.latest() is None:
        save(0, state)
    train_step = steps.pmap_train_step(steps.make_train_step(config, parts.model, parts.devices), parts.devices)
    batches = data.train_stream(
        parts.corpus, config, start, num_devices=len(parts.local),
        process_index=jax.process_index(), process_count=jax.process_count(),
    )  # fmt: skip
    profile = Profiler(parts.workdir / "profile", start, config.log.profile_steps)
    reporter.start()
    try:
        state, step = train(
            state, train_step, batches, start=start, steps=config.steps, sharding=parts.sharding,
            on_step=make_on_step(parts, write, start, num_flops=flops_per_token(config.model, state.params, config.seq_len)),
            hooks=[(profile.due, profile), (every(config.eval.every_steps), run_evaluation),
                   (every(config.checkpoint.every_steps), save)],
            should_stop=stop.agreed,
        )  # fmt: skip
        if step < config.steps:
            save(step, state)
        checkpoints.wait()
    finally:
        reporter.stop()
        batches.close()
        checkpoints.close()
    if step < config.steps:
        reporter.say(f"stopped after step {step}, saved; run the same command again to go on")
        return STOPPED
    if start == config.steps:
        scores[step] = evaluation(step, state)
    finish(parts, scores[step]["eval_bits_per_byte"])
    return 0


def load_state(parts: Parts, state: steps.TrainState) -> steps.TrainState:
    """The newest checkpoint's state; else fresh, with the weights that `checkpoint.resume` names."""
    newest, resume = parts.checkpoints.latest(), parts.config.checkpoint.resume
    if newest is not None:
        if newest > parts.config.steps:
            raise UserError(f"steps is {parts.config.steps}; allowed: at least {newest}, the steps already done in {parts.workdir}")
        return parts.checkpoints.restore(newest, like=state)
    if resume in ("auto", "never"):
        return state
    source = Path(resume)
    if not (source / "checkpoints").is_dir():
        raise UserError(f"checkpoint.resume is '{resume}'; allowed: auto, never, or a workdir that holds checkpoints")
    other = Checkpointer(source, parts.config.checkpoint)
    step = other.latest()
    if step is None:
        raise UserError(f"checkpoint.resume is '{resume}'; there is no whole checkpoint in it")
    params = other.restore_params(step)
    other.close()
    here, there = ({k: v.shape for k, v in flat_items(tree)} for tree in (state.params, params))
    if here != there:
        key = next(k for k in sorted(here.keys() | there.keys()) if here.get(k) != there.get(k))
        raise UserError(f"checkpoint.resume is '{resume}'; its {key} is {there.get(key)}, this model's {here.get(key)}")
    parts.reporter.say(f"starts from the weights of step {step} in {source}")
    fresh = jax.tree.map(lambda p, x: jax.device_put(np.asarray(x, p.dtype), p.sharding), state.params, params)
    return state._replace(params=fresh, ema=None if state.ema is None else jax.tree.map(jax.numpy.copy, fresh))


def flat_items(tree: Any) -> list[tuple[str, Any]]:
    return [("/".join(k.key for k in path), x) for path, x in jax.tree_util.tree_flatten_with_path(tree)[0]]


def describe(parts: Parts, state: steps.TrainState, start: int) -> None:
    """The line of facts at the start."""
    c, facts = parts.config, parts.corpus.facts
    kind = parts.devices[0].device_kind
    per_step = c.batch_size * c.seq_len
    epochs = c.steps * per_step / max(len(parts.corpus.train), 1)
    parts.reporter.say(
        f"jaxlm · {len(parts.devices)} x {kind} · {human(num_params(state.params))} parameters"
        f" · {human(per_step)} tokens per step · {c.steps} steps = {human(c.steps * per_step)} tokens"
        f" ({epochs:.2f} epochs of {c.data.source}) · {parts.workdir}"
    )
    sizes = [
        f"{split}: " + ", ".join(f"{human(facts[split][k])} {k}" for k in ("documents", "bytes", "tokens") if k in facts[split])
        for split in ("train", "val") if split in facts
    ]  # fmt: skip
    parts.reporter.say(f"{c.data.source} · " + " · ".join(sizes))
    if start:
        parts.reporter.say(f"goes on after step {start}")


def make_writer(parts: Parts, start: int) -> metrics.Writer:
    """Sends metrics to every place that the configuration names; on the first process only."""
    if jax.process_index() != 0:
        return lambda _: None
    writers: list[metrics.Writer] = [metrics.JsonLines(parts.workdir / "metrics.jsonl", start)]
    if parts.config.log.tensorboard:
        writers.append(metrics.tensorboard(parts.workdir / "tensorboard", start))
    if parts.config.log.wandb:
        writers.append(metrics.wandb_writer(parts.config, parts.workdir))

    def write(m: metrics.Metrics) -> None:
        for writer in writers:
            writer(m)

    return write


def make_on_step(parts: Parts, write: metrics.Writer, start: int, num_flops: float) -> Callable[[Done], None]:
    """Reports finished steps: progress for each, all numbers for the first, every Nth and the last."""
    c = parts.config
    per_step = c.batch_size * c.seq_len
    peak = metrics.peak_flops(parts.devices[0].device_kind)
    last_step, last_seconds = start, 0.0

    def on_step(done: Done) -> None:
        nonlocal last_step, last_seconds
        parts.reporter.progress(done.step)
        if not (done.step in (1, c.steps) or done.step % c.log.every_steps == 0):
            if done.step == start + 1:  # it was compiled in this one: no measure of the others
                last_step, last_seconds = done.step, done.seconds
            return
        seconds = (done.seconds - last_seconds) / (done.step - last_step)
        last_step, last_seconds = done.step, done.seconds
        rate = per_step / seconds
        m = {"step": done.step, **{k: float(v) for k, v in done.metrics.items()}}
        m |= {"tokens": done.step * per_step, "tokens_per_second": rate, "step_seconds": seconds,
              "mfu": rate * num_flops / (peak * len(parts.devices)) if peak else None}  # fmt: skip
        write(m)
        parts.reporter.train(m)

    return on_step


def make_evaluation(parts: Parts, write: metrics.Writer) -> Callable[[int, steps.TrainState], dict[str, Any]]:
    """(step, state) -> scores on the validation set, written and shown with a sample of text."""
    c, corpus = parts.config, parts.corpus
    eval_step = steps.pmap_eval_step(steps.make_eval_step(c, parts.model), parts.devices)

    def evaluation(step: int, state: steps.TrainState) -> dict[str, Any]:
        params = state.params if state.ema is None else state.ema
        batches = data.eval_batches(
            corpus.val, c, c.batch_size // c.optim.accum_steps, num_devices=len(parts.local),
            process_index=jax.process_index(), process_count=jax.process_count(), limit=c.eval.batches,
        )  # fmt: skip
        scores = evaluate(eval_step, params, batches, corpus.bytes_per_token)
        write({"step": step, **scores})
        parts.reporter.evaluation({"step": step, **scores}, sample_text(parts, params))
        return scores

    return evaluation


def sample_text(parts: Parts, params: Any) -> str | None:
    """A continuation of `eval.sample_prompt`; None where no text is wanted, or tokens are not text."""
    c, tokenizer = parts.config, parts.corpus.tokenizer
    if not c.eval.sample_tokens or tokenizer is None or jax.process_index() != 0:
        return None
    prompt = np.concatenate([[tokenizer.bos_id], tokenizer.encode([c.eval.sample_prompt])[0]]).astype(np.int32)
    new = c.eval.sample_tokens
    if c.model.position != "rope":
        prompt = prompt[: max(c.seq_len - 1, 1)]
        new = min(new, c.seq_len - len(prompt))
    if new < 1:
        return None
    here = jax.tree.map(lambda x: x.addressable_shards[0].data, params)
    tokens = generate(
        parts.model, here, prompt[None], jax.random.key(c.seed), max_new_tokens=new, temperature=0.8, top_p=0.95
    )
    return tokenizer.decode(np.concatenate([prompt[1:], np.asarray(tokens[0])]))


def finish(parts: Parts, bits: float | None) -> None:
    """The end: the score beside those of compressors, and what to type next."""
    from jaxlm.data.baselines import compression_baselines

    say, workdir = parts.reporter.say, parts.workdir
    if bits is not None and parts.config.eval.baselines and jax.process_index() == 0:
        if baselines := compression_baselines(parts.corpus):
            parts.reporter.comparison(baselines, bits)
    if parts.corpus.tokenizer is not None:
        say(f"next: python tools/generate.py --workdir {workdir} --prompt 'def main('")
    else:
        say(f"next: python tools/evaluate.py --workdir {workdir}")


def save_tokenizer(corpus: data.Corpus, workdir: Path) -> None:
    """The tokenizer travels with the workdir."""
    if corpus.tokenizer is None or (workdir / "tokenizer").exists():
        return
    temporary = workdir / "tokenizer.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    corpus.tokenizer.save(temporary)
    temporary.rename(workdir / "tokenizer")


def check_same_corpus(workdir: Path, corpus: data.Corpus) -> None:
    """Raises UserError if the run in this workdir was trained on other data: its steps would mean something else."""
    if not (workdir / "checkpoints").exists():
        return
    before = workdirs.read_facts(workdir).get("data_fingerprint")
    if before != corpus.fingerprint:
        raise UserError(
            f"--workdir {workdir}: the data has changed since this run began (fingerprint {before}, now {corpus.fingerprint});"
            " allowed: the same data, or another workdir (checkpoint.resume=PATH takes weights from this one)"
        )


def wait_for_all(what: str) -> None:
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(what)


class StopSignal:
    """SIGTERM or SIGINT: stop after the step under way. A second one ends the process at once."""

    AGREE_EVERY = 10  # steps; with several processes, all must stop after the same one

    def __init__(self) -> None:
        self.received = False
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._receive)

    def _receive(self, number: int, frame: Any) -> None:
        self.received = True
        for other in (signal.SIGTERM, signal.SIGINT):
            signal.signal(other, signal.SIG_DFL)

    def agreed(self, step: int) -> bool:
        if jax.process_count() == 1:
            return self.received
        if step % self.AGREE_EVERY:
            return False
        return bool(multihost_utils.process_allgather(np.array(self.received)).any())


class Profiler:
    """Traces `count` steps, after the first ones have warmed up, for TensorBoard or Perfetto."""

    def __init__(self, folder: Path, start: int, count: int):
        self._folder, self._first, self._count = folder, start + 5, count

    def due(self, step: int) -> bool:
        return self._count > 0 and step in (self._first, self._first + self._count)

    def __call__(self, step: int, state: steps.TrainState) -> None:
        jax.block_until_ready(state.step)
        if step == self._first:
            jax.profiler.start_trace(str(self._folder))
        else:
            jax.profiler.stop_trace()
