"""Reports finished steps: metrics, the console's lines, and the error that ends a series of bad steps."""

import math
from collections.abc import Callable

import jax

from jaxlm.checkpoint import metrics_file
from jaxlm.checkpoint.rollback import Trouble
from jaxlm.host import memory
from jaxlm.run import metrics
from jaxlm.run.begin import Parts
from jaxlm.run.charts import by_layer, shortened, tensorboard, wandb_writer
from jaxlm.train import layer_stats, trained
from jaxlm.train.loop import Done
from jaxlm.train.loss_mean import is_logged

MAX_HIGH = 100  # losses in a row that are much too high; a run that recovers from a spike has fewer


def make_log(parts: Parts, start: int) -> metrics.Log:
    """The log of all metrics that the configuration asks for; empty on all processes but the first."""
    if jax.process_index() != 0:
        return metrics.Log([], parts.reporter.say)
    writers: list[metrics.Writer] = [metrics_file.JsonLines(parts.workdir / "metrics.jsonl", start)]
    charts: list[metrics.Writer] = []
    if parts.config.log.tensorboard:
        charts.append(tensorboard(parts.workdir / "tensorboard", parts.config, start))
    if parts.config.log.wandb:
        charts.append(wandb_writer(parts.config, parts.workdir))
    names = [share.name for share in parts.corpus.shares]
    writers += [by_layer(shortened(chart, names)) for chart in charts]
    return metrics.Log(writers, parts.reporter.say)


def make_on_step(parts: Parts, write: metrics.Writer, start: int) -> Callable[[Done], None]:
    """Returns the function that reports finished steps: progress after each, all numbers after the first, every Nth
    and the last.

    Raises:
      Trouble: `max_skipped` steps in a row were skipped, or MAX_HIGH losses in a row were much too high.
    """
    c = parts.config
    per_step = c.batch_size * c.seq_len
    flops = trained.flops_per_token(c, parts.placement.whole.params)
    peak = metrics.peak_flops(parts.devices[0].device_kind)
    check = _make_check(parts)
    last_step, last_seconds = start, 0.0

    def on_step(done: Done) -> None:
        nonlocal last_step, last_seconds
        parts.reporter.progress(done.step)
        check(done)
        if is_logged(done.step, c):
            seconds = (done.seconds - last_seconds) / (done.step - last_step)
            rate = per_step / seconds
            m = {"step": done.step, **{k: float(done.metrics[k]) for k in ("loss", "loss_mean", "lr", "grad_norm")}}
            m |= {k: int(done.metrics[k]) for k in ("skipped", "spikes")}
            m |= {"tokens": done.step * per_step, "tokens_per_second": rate, "step_seconds": seconds}
            m |= {"mfu": rate * flops / (peak * len(parts.devices)) if peak else None}
            m |= {"peak_memory_bytes": memory.peak_of(parts.placement.local)}
            m |= _consumed(parts, done.step) | layer_stats.numbers(done.metrics)
            write(m)
            parts.reporter.train(m)
        elif done.step != start + 1:  # the first step compiles everything, so its time says nothing of the others
            return
        last_step, last_seconds = done.step, done.seconds

    return on_step


def _make_check(parts: Parts) -> Callable[[Done], None]:
    """Returns the function that prints what the guard did in a step, and raises Trouble after too many bad steps."""
    c, say = parts.config.optim, parts.reporter.say
    spikes_before: int | None = None

    def check(done: Done) -> None:
        nonlocal spikes_before
        in_row, high, spikes = (int(done.metrics[key]) for key in ("in_row", "high", "spikes"))
        loss, norm = (float(done.metrics[key]) for key in ("loss", "grad_norm"))
        why = f"the loss is {loss:.4g}, the gradient's norm {norm:.4g}"
        if in_row:
            if math.isfinite(loss) and math.isfinite(norm):
                why += ", a spike (optim.spike_factor), which optim.on_spike=skip leaves out"
            say(f"step {done.step} skipped, with batch {parts.order.batch_number(done.step)}: {why}")
            if in_row >= c.max_skipped:
                raise Trouble(done.step - in_row + 1, done.step, f"{in_row} steps in a row were skipped: {why}")
        elif spikes == 1 and spikes_before == 0:
            say(
                f"step {done.step}: the gradient's norm, {norm:.4g}, is a spike and was scaled down"
                " (optim.spike_factor); metrics.jsonl counts further ones as spikes"
            )
        spikes_before = spikes
        if high >= MAX_HIGH:
            worse = f"{high} losses in a row were much higher than before anything was learned"
            raise Trouble(done.step - high + 1, done.step, f"{worse}: {why}")

    return check


def _consumed(parts: Parts, step: int) -> dict[str, float]:
    """Epochs of the training data; for a mixture, epochs and tokens of each source."""
    sources = parts.order.consumed(step)
    if not parts.corpus.shares:
        return {"epochs": sources[0].epochs}
    return {f"epochs/{s.name}": s.epochs for s in sources} | {f"tokens/{s.name}": s.tokens for s in sources}
