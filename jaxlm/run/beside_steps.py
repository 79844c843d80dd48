"""What happens beside the steps: metrics, evaluation with a sample of text, profiling."""

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from jaxlm.checkpoint import metrics_file
from jaxlm.checkpoint.rollback import Trouble
from jaxlm.data.prompts import Continuation, encode_prompt, make_ending
from jaxlm.data.sources.conversations import trains_on_answers
from jaxlm.host.stop import NEVER, Interrupted, Stop
from jaxlm.model import flops_per_token
from jaxlm.model.generate import stream
from jaxlm.run import metrics
from jaxlm.run.charts import shortened, tensorboard, wandb_writer
from jaxlm.run.phases import counted
from jaxlm.run.setup import Parts, eval_batches
from jaxlm.run.time_left import num_eval_batches
from jaxlm.train import step as train_step
from jaxlm.train.evaluate import evaluate
from jaxlm.train.loop import Done
from jaxlm.train.loss_mean import is_logged

MAX_HIGH = 100  # losses in a row that are much too high; a run that recovers from a spike has fewer


def make_log(parts: Parts, start: int) -> metrics.Log:
    """Where metrics go: every place that the configuration names; on the first process only."""
    if jax.process_index() != 0:
        return metrics.Log([], parts.reporter.say)
    writers: list[metrics.Writer] = [metrics_file.JsonLines(parts.workdir / "metrics.jsonl", start)]
    charts: list[metrics.Writer] = []
    if parts.config.log.tensorboard:
        charts.append(tensorboard(parts.workdir / "tensorboard", parts.config, start))
    if parts.config.log.wandb:
        charts.append(wandb_writer(parts.config, parts.workdir))
    names = [share.name for share in parts.corpus.shares]
    writers += [shortened(chart, names) for chart in charts]
    return metrics.Log(writers, parts.reporter.say)


def make_on_step(parts: Parts, write: metrics.Writer, params: Any, start: int) -> Callable[[Done], None]:
    """Reports finished steps: progress for each, all numbers for the first, every Nth and the last.

    Raises:
      Trouble: `max_skipped` steps in a row were skipped, or MAX_HIGH losses in a row were much too high.
    """
    c = parts.config
    per_step = c.batch_size * c.seq_len
    flops = flops_per_token(c.model, params, c.seq_len)
    peak = metrics.peak_flops(parts.devices[0].device_kind)
    last_step, last_seconds = start, 0.0
    spikes: int | None = None  # before this step

    def on_step(done: Done) -> None:
        nonlocal last_step, last_seconds, spikes
        parts.reporter.progress(done.step)
        in_row, high, found = (int(done.metrics[key]) for key in ("in_row", "high", "spikes"))
        loss, norm = (float(done.metrics[key]) for key in ("loss", "grad_norm"))
        why = f"the loss is {loss:.4g}, the gradient's norm {norm:.4g}"
        if in_row:
            if math.isfinite(loss) and math.isfinite(norm):
                why += ", a spike (optim.spike_factor), which optim.on_spike=skip leaves out"
            parts.reporter.say(f"step {done.step} skipped, with batch {parts.order.number(done.step)}: {why}")
            if in_row >= c.optim.max_skipped:
                raise Trouble(done.step - in_row + 1, done.step, f"{in_row} steps in a row were skipped: {why}")
        elif found == 1 and spikes == 0:
            parts.reporter.say(
                f"step {done.step}: the gradient's norm, {norm:.4g}, is a spike and was scaled down"
                " (optim.spike_factor); metrics.jsonl counts further ones as spikes"
            )
        spikes = found
        if high >= MAX_HIGH:
            worse = f"{high} losses in a row were much higher than before anything was learned"
            raise Trouble(done.step - high + 1, done.step, f"{worse}: {why}")
        if is_logged(done.step, c):
            seconds = (done.seconds - last_seconds) / (done.step - last_step)
            rate = per_step / seconds
            m = {"step": done.step, **{k: float(done.metrics[k]) for k in ("loss", "loss_mean", "lr", "grad_norm")}}
            m |= {"skipped": int(done.metrics["skipped"]), "spikes": found}
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


def make_evaluation(
    parts: Parts, write: metrics.Writer, at: Callable[[int, str], None] = lambda step, doing: None, stop: Stop = NEVER
) -> Callable[[int, train_step.TrainState], dict[str, Any]]:
    """Returns (step, state) -> scores on the validation set, which writes and shows them with a sample of text. It
    raises Interrupted if it is asked to stop before that.
    """
    eval_step = train_step.pmap_eval_step(train_step.make_eval_step(parts.config, parts.model), parts.devices)

    def evaluation(step: int, state: train_step.TrainState) -> dict[str, Any]:
        params = state.params if state.ema is None else state.ema
        batches = _telling(eval_batches(parts), lambda: at(step, "evaluating"))
        with parts.reporter.phase("evaluating", num_eval_batches(parts.config, len(parts.corpus.val))) as advance:
            shown = counted(batches, advance)
            scores = stop.together(lambda: evaluate(eval_step, params, shown, parts.corpus.bytes_per_token, stop))
        if not math.isfinite(scores["eval_loss"]):
            raise bad_since(parts, step, f"the validation loss after step {step} is {scores['eval_loss']}")
        if stop.now():  # the sample takes time and belongs to the same line: the run makes both when it goes on
            raise Interrupted
        with parts.reporter.phase("sampling"):
            sample = stop.together(lambda: sample_text(parts, params, stop.now))
        if stop.now():  # it may have been cut
            raise Interrupted
        m = {"step": step, **scores} | ({} if sample is None else {"sample": sample})
        write(m)
        parts.reporter.evaluation(m)
        return scores

    return evaluation


def _telling(batches: Iterator[Any], tell: Callable[[], None]) -> Iterator[Any]:
    for batch in batches:
        tell()
        yield batch


def bad_since(parts: Parts, step: int, why: str) -> Trouble:
    """The trouble of a bad state: any step since the newest checkpoint, which was good, may be its cause."""
    return Trouble(min((parts.saver.wait() or 0) + 1, step), step, why)


@jax.jit
def all_finite(tree: Any) -> jax.Array:
    return jnp.stack([jnp.isfinite(x).all() for x in jax.tree.leaves(tree)]).all()


def sample_text(parts: Parts, params: Any, stop: Callable[[], bool]) -> str | None:
    """`eval.sample_prompt` with its continuation, or with the answer to it; None if no text is wanted, or tokens are
    not text. A request to stop ends it early.
    """
    c, tokenizer = parts.config, parts.corpus.tokenizer
    if not c.eval.sample_tokens or tokenizer is None or jax.process_index() != 0:
        return None
    chat, text = trains_on_answers(c.data), c.eval.sample_prompt
    prompt = encode_prompt(tokenizer, c.data, text, chat)[-c.seq_len :]
    here = jax.tree.map(lambda x: x.addressable_shards[0].data, params)
    blocks = stream(
        parts.model, here, prompt[None], jax.random.key(c.seed), max_new_tokens=c.eval.sample_tokens, temperature=0.8,
        top_p=0.95, stop=stop,
    )  # fmt: skip
    sample = Continuation(tokenizer, prompt, make_ending(tokenizer, c.data))
    text += "\n" if chat else ""
    for block in blocks:
        text += sample.add(block[0].tolist())
        if sample.ended:
            break
    return text + sample.finish()


class Profiler:
    """Traces `count` steps, after the first 5 (where so many are left) have warmed up, for TensorBoard or Perfetto."""

    def __init__(self, folder: Path, start: int, steps: int, count: int):
        self._folder, self._count, self._tracing = folder, count, False
        self._first = start + max(0, min(5, steps - start - count))

    def due(self, step: int) -> bool:
        return self._count > 0 and step in (self._first, self._first + self._count)

    def __call__(self, step: int, state: train_step.TrainState) -> None:
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
