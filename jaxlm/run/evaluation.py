"""Evaluation: scores on the validation set, and a sample of text."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import jax

from jaxlm.data.prompts import Continuation, encode_prompt, make_ending, makes_answers, start_of
from jaxlm.data.sources.conversations import trains_on_answers
from jaxlm.host.stop import NEVER, Interrupted, Stop
from jaxlm.model import Params
from jaxlm.model.cross_attention import Prompts
from jaxlm.model.generate import stream
from jaxlm.run import metrics
from jaxlm.run.begin import Parts
from jaxlm.run.go_back import bad_since
from jaxlm.run.phases import Phases, counted
from jaxlm.run.setup import Setup
from jaxlm.train import trained
from jaxlm.train.evaluate import evaluate
from jaxlm.train.step import TrainState


def make_score(setup: Setup, phases: Phases, stop: Stop = NEVER) -> Callable[..., dict[str, Any]]:
    """Returns (params, function to call before each batch) -> scores on the validation set. It shows its progress, and
    raises Interrupted if it is asked to stop.
    """
    eval_step, corpus, total = setup.eval_step(), setup.corpus, setup.num_eval_batches()

    def score(params: Params, before_batch: Callable[[], None] = lambda: None) -> dict[str, Any]:
        with phases.phase("evaluating", total) as advance:
            batches = counted(_announced(setup.eval_batches(), before_batch), advance)
            return stop.together(lambda: evaluate(eval_step, params, batches, corpus.bytes_per_token, stop))

    return score


def _announced(batches: Iterator[Any], before: Callable[[], None]) -> Iterator[Any]:
    for batch in batches:
        before()
        yield batch


def make_evaluation(
    parts: Parts,
    write: metrics.Writer,
    reached: Callable[[int, str], None] = lambda step, doing: None,
    stop: Stop = NEVER,
) -> Callable[[int, TrainState], dict[str, Any]]:
    """Returns (step, state) -> scores on the validation set. It writes and shows them with a sample of text, or raises
    Interrupted before it does, if it is asked to stop.
    """
    score = make_score(parts, parts.reporter, stop)

    def evaluation(step: int, state: TrainState) -> dict[str, Any]:
        params = state.params if state.ema is None else trained.joined(state.params, state.ema)
        scores = score(params, lambda: reached(step, "evaluating"))
        if not math.isfinite(scores["eval_loss"]):
            raise bad_since(parts, step, f"the validation loss after step {step} is {scores['eval_loss']}")
        if stop.now():  # the sample takes time and goes into the same line: a resumed run makes both
            raise Interrupted
        with parts.reporter.phase("sampling"):
            sample = stop.together(lambda: sample_text(parts, params, stop.now))
        if stop.now():  # the sample may be cut short
            raise Interrupted
        m = {"step": step, **scores} | ({} if sample is None else {"sample": sample})
        write(m)
        parts.reporter.evaluation(m)
        return scores

    return evaluation


def sample_text(parts: Parts, params: Any, stop: Callable[[], bool]) -> str | None:
    """`eval.sample_prompt` with its continuation or, for chats, the answer to it. A request to stop ends it early,
    unless several processes make the sample together, because each holds a part of the parameters.

    None if no sample is wanted or there is no tokenizer; None on all processes but the first.
    """
    c, tokenizer = parts.config, parts.corpus.tokenizer
    together = parts.placement.in_parts and jax.process_count() > 1
    first = jax.process_index() == 0
    if not c.eval.sample_tokens or tokenizer is None or not (first or together):
        return None
    text = c.eval.sample_prompt
    start = start_of(c, encode_prompt(tokenizer, c.data, text, trains_on_answers(c.data)))
    how: dict[str, Any] = {"max_new_tokens": c.eval.sample_tokens, "temperature": 0.8, "top_p": 0.95}
    how |= {"prompts": Prompts.repeated(start.prompt, 1)} | ({} if together else {"stop": stop})
    blocks = stream(*parts.placement.for_sampling(params), start.ids[None], jax.random.key(c.seed), **how)
    sample = Continuation(tokenizer, start.ids, make_ending(tokenizer, c.data))
    text += "\n" if makes_answers(c) else ""
    for block in blocks:
        text += sample.add(block[0].tolist())
        if sample.ended:
            break
    return text + sample.finish() if first else None
