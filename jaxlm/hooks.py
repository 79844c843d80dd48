"""What happens beside the steps: metrics, evaluation with a sample of text, profiling."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxlm import metrics
from jaxlm import step as steps
from jaxlm.evaluate import evaluate
from jaxlm.generate import generate
from jaxlm.model import flops_per_token
from jaxlm.parts import Parts, eval_batches
from jaxlm.train import Diverged, Done


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


def make_on_step(parts: Parts, write: metrics.Writer, params: Any, start: int) -> Callable[[Done], None]:
    """Reports finished steps: progress for each, all numbers for the first, every Nth and the last."""
    c = parts.config
    per_step = c.batch_size * c.seq_len
    flops = flops_per_token(c.model, params, c.seq_len)
    peak = metrics.peak_flops(parts.devices[0].device_kind)
    last_step, last_seconds = start, 0.0

    def on_step(done: Done) -> None:
        nonlocal last_step, last_seconds
        parts.reporter.progress(done.step)
        if not math.isfinite(float(done.metrics["grad_norm"])):  # nor is a loss finite without a finite gradient
            bad = "grad_norm" if math.isfinite(float(done.metrics["loss"])) else "loss"
            raise Diverged(
                f"training diverged: {bad} is {float(done.metrics[bad])} in step {done.step}; the newest checkpoint is"
                f" of step {parts.checkpoints.latest()}; a lower optim.lr, more optim.warmup_steps or optim.clip_norm"
                " may help"
            )
        if done.step in (1, c.steps) or done.step % c.log.every_steps == 0:
            seconds = (done.seconds - last_seconds) / (done.step - last_step)
            rate = per_step / seconds
            m = {"step": done.step, **{k: float(v) for k, v in done.metrics.items()}}
            m |= {"tokens": done.step * per_step, "tokens_per_second": rate, "step_seconds": seconds,
                  "mfu": rate * flops / (peak * len(parts.devices)) if peak else None}  # fmt: skip
            m |= _consumed(parts, done.step)
            write(m)
            parts.reporter.train(m)
        elif done.step != start + 1:  # the first step is when all is compiled: no measure of the others
            return
        last_step, last_seconds = done.step, done.seconds

    return on_step


def _consumed(parts: Parts, step: int) -> dict[str, float]:
    """Epochs of the training data; of a mixture those of each source, and its tokens."""
    sources = parts.order.consumed(step)
    if not parts.corpus.shares:
        return {"epochs": sources[0].epochs}
    return {f"epochs/{s.name}": s.epochs for s in sources} | {f"tokens/{s.name}": s.tokens for s in sources}


def make_evaluation(parts: Parts, write: metrics.Writer) -> Callable[[int, steps.TrainState], dict[str, Any]]:
    """(step, state) -> scores on the validation set, written and shown with a sample of text."""
    eval_step = steps.pmap_eval_step(steps.make_eval_step(parts.config, parts.model), parts.devices)

    def evaluation(step: int, state: steps.TrainState) -> dict[str, Any]:
        params = state.params if state.ema is None else state.ema
        scores = evaluate(eval_step, params, eval_batches(parts), parts.corpus.bytes_per_token)
        if not math.isfinite(scores["eval_loss"]):
            raise Diverged(f"training diverged: the validation loss after step {step} is {scores['eval_loss']}")
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
    if c.model.position != "rope":  # the other positions end where training sequences do
        new = min(new, c.seq_len - len(prompt))
    if new < 1:
        return None
    here = jax.tree.map(lambda x: x.addressable_shards[0].data, params)
    key = jax.random.key(c.seed)
    tokens = generate(parts.model, here, prompt[None], key, max_new_tokens=new, temperature=0.8, top_p=0.95)
    return tokenizer.decode(np.concatenate([prompt[1:], np.asarray(tokens[0])]))


class Profiler:
    """Traces `count` steps, after the first 5 (where so many are left) have warmed up, for TensorBoard or Perfetto."""

    def __init__(self, folder: Path, start: int, steps: int, count: int):
        self._folder, self._count, self._tracing = folder, count, False
        self._first = start + max(0, min(5, steps - start - count))

    def due(self, step: int) -> bool:
        return self._count > 0 and step in (self._first, self._first + self._count)

    def __call__(self, step: int, state: steps.TrainState) -> None:
        jax.block_until_ready(state.step)
        if step == self._first:
            jax.profiler.start_trace(str(self._folder))
            self._tracing = True
        else:
            self.close()

    def close(self) -> None:
        """Writes what has been traced; a run may end sooner than the trace."""
        if self._tracing:
            self._tracing = False
            jax.profiler.stop_trace()
