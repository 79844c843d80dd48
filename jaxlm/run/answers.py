"""The answers of a model with an encoder to the prompts of a validation set."""

from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm import data
from jaxlm.config import Config, UserError
from jaxlm.data.pairs import Pairs, pack_pairs
from jaxlm.data.prompts import Continuation, make_ending
from jaxlm.data.tokens import Tokens
from jaxlm.model.cross_attention import Prompts
from jaxlm.model.generate import stream
from jaxlm.run.open_run import Run

ROWS = 64  # answers made at once, fewer of long prompts
SCORES = 2**28  # numbers in the encoder's scores of attention at once: 1 GiB


class Answer(NamedTuple):
    prompt: str
    answer: str  # the most probable token after the most probable token, up to the answer's end
    expected: str


def answers(run: Run, config: Config) -> Iterator[Answer]:
    """Yields the answer to each prompt of the validation data of `config`, in the order of the corpus, made on one
    device. Answers have at most `seq_len` tokens; prompts that are longer than `model.encoder_len` lose their ends, as
    in training.

    Raises:
      UserError: the run has no tokenizer, or the data no prompts, or conversations with more than one answer.
    """
    corpus, tokenizer, S = data.prepare(config, progress=False), run.tokenizer, config.model.encoder_len
    if tokenizer is None:
        raise UserError(f"{run.folder}: the run has no tokenizer, so its tokens are not text")
    for part in corpus.parts:
        check_single(part.val, pack_pairs(part.val, S, config.seq_len))
    run = run._replace(params=jax.device_put(run.params))
    rows = max(1, min(ROWS, SCORES // (config.model.num_heads * S * S)))
    ending = make_ending(tokenizer, config.data)
    bos = np.array([tokenizer.bos_id], np.int32)

    def answer_of(ids: np.ndarray) -> str:
        shown = Continuation(tokenizer, bos, ending)
        return shown.add(ids.tolist()) + shown.finish()

    for part in corpus.parts:
        pairs = pack_pairs(part.val, S, config.seq_len)
        order = np.argsort(pairs.starts)
        places = list(zip(*(x[order].tolist() for x in (pairs.starts, pairs.answers, pairs.stops)), strict=True))
        for first in range(0, len(places), rows):
            batch = places[first : first + rows]
            prompts = [part.val.span(start, min(answer, start + S)) for start, answer, _ in batch]
            made = _made(run, prompts, rows, bos, S, config.seq_len, ending.ids)
            for (start, answer, stop), ids in zip(batch, made, strict=False):
                prompt, expected = part.val.span(start + 1, answer), part.val.span(answer, stop)
                yield Answer(tokenizer.decode(prompt), answer_of(ids), answer_of(expected))


def check_single(tokens: Tokens, pairs: Pairs) -> None:
    """Raises UserError if there is a conversation with more than one answer: its later turns have no prompt here."""
    learned = (tokens.targets(np.array([a]), b - a)[0] >= 0 for a, b in zip(pairs.answers, pairs.stops, strict=True))
    if several := sum(bool(np.any(~x[:-1] & x[1:])) for x in learned):
        raise UserError(
            f"--answers: {several:,} of {len(pairs.answers):,} conversations of the validation set have more than one"
            " answer; allowed: pairs of a prompt and an answer"
        )


def _made(
    run: Run, prompts: list[np.ndarray], rows: int, bos: np.ndarray, S: int, max_tokens: int, ends: frozenset[int]
) -> np.ndarray:
    """The tokens of the answers to at most `rows` prompts, int32 [rows, n]."""
    tokens_BS, positions_BS = np.zeros((2, rows, S), np.int32)
    for row, prompt in enumerate(prompts):
        tokens_BS[row, : len(prompt)], positions_BS[row, : len(prompt)] = prompt, np.arange(len(prompt))
    ended = np.arange(rows) >= len(prompts)
    blocks = []
    for block in stream(
        run.model,
        run.params,
        np.tile(bos, (rows, 1)),
        jax.random.key(0),
        max_new_tokens=max_tokens,
        temperature=0,
        prompts=Prompts(jnp.asarray(tokens_BS), jnp.asarray(positions_BS)),
    ):
        blocks.append(block)
        ended |= np.isin(block, list(ends)).any(axis=1)
        if ended.all():
            break
    return np.concatenate(blocks, axis=1)
