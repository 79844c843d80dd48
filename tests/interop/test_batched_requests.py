"""Scores and continuations of rows of different lengths, batched over eight devices, against one row at a time."""

import jax
import numpy as np
import pytest

from jaxlm.config import UserError
from jaxlm.interop.batches import Devices
from jaxlm.interop.continuing import Continuer
from jaxlm.interop.generation_kwargs import cut, generation
from jaxlm.interop.scoring import Pair, Scorer
from jaxlm.model import ragged
from jaxlm.model.generate import Sampling, generate
from jaxlm.run.open_run import Run
from tests.decoders import logits_of, with_
from tests.interop.test_interop import LONGROPE, PLAIN, ROWS, make_run

MODELS = {
    "learned": with_(position="learned", use_bias=True, key_offset=True),
    "longrope": with_(**PLAIN, **LONGROPE, window=9, global_every=2),  # other frequencies from 8 positions on
}
CONTEXT = 32
LENGTHS = (1, 8, 9, 21)


@pytest.fixture(scope="module", params=MODELS)
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return make_run(tmp_path_factory.mktemp(request.param) / "run", MODELS[request.param])


def texts() -> list[list[int]]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, ROWS, length).tolist() for length in LENGTHS]


def test_scores(run: Run, monkeypatch: pytest.MonkeyPatch):
    rows = None if run.config.model.position == "learned" else 3
    monkeypatch.setattr("jaxlm.interop.scoring.LOGITS", 3 * ROWS)  # three tokens at a time
    pairs = [Pair(text[: len(text) // 3 + 1], [*text[len(text) // 3 + 1 :], 1]) for text in texts()]
    logits = jax.jit(logits_of(run.model))
    best = int(np.argmax(logits(run.params, np.array([texts()[2]]))[0, -1]))
    pairs += [Pair(texts()[2], [best]), Pair(texts()[3] * 2, texts()[2])]  # the last one is longer than the context
    done = []
    found = Scorer(run, Devices(run.params), CONTEXT, rows)(pairs, done.append)
    assert sum(done) == len(pairs)
    for (context, continuation), score in zip(pairs, found, strict=True):
        tokens = [*context, *continuation][-(CONTEXT + 1) :]
        log_p = jax.nn.log_softmax(logits(run.params, np.array([tokens[:-1]]))[0])[-len(continuation) :]
        want = np.asarray(log_p, np.float64)[np.arange(len(continuation)), continuation]
        assert score.log_likelihood == pytest.approx(want.sum(), abs=1e-4)
        assert score.is_greedy == (np.argmax(np.asarray(log_p), axis=-1) == continuation).all()
    assert [score.is_greedy for score in found].count(True) >= 1


def test_continuations(run: Run, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(ragged, "PIECES", (4,))
    monkeypatch.setattr("jaxlm.interop.continuing.BLOCK", 3)
    prompts, seen, devices = texts(), [], Devices(run.params)
    found = Continuer(run, devices, CONTEXT, None, 0)(
        prompts, range(4), 7, Sampling(0.0, 0, 1.0), lambda ids: seen.append(len(ids)) or False
    )
    for prompt, new in list(zip(prompts, found, strict=True))[:3]:
        want = generate(run.model, run.params, np.array([prompt]), jax.random.key(0), max_new_tokens=7, temperature=0.0)
        assert new == want[0].tolist()
    assert len({*map(tuple, found)}) > 2 and max(seen) < 7


def test_samples_depend_on_the_seed_and_the_number(run: Run):
    if run.config.model.position != "learned":
        return
    args = 7, Sampling(1.0, 5, 0.9), lambda ids: False
    one, two = (Continuer(run, Devices(run.params), CONTEXT, None, seed) for seed in (1, 2))
    found = one(texts(), range(4), *args)
    assert found == one(texts(), range(4), *args) != two(texts(), range(4), *args)
    again = one([texts()[3]] * 2, [3, 4], *args)
    assert again[0] == found[3] != again[1]


def test_what_a_request_asks_for():
    greedy = Sampling(0.0, 0, 1.0)
    assert generation({"until": ["\n", ""]}, 9) == (9, ("\n",), greedy)
    assert generation({"until": "a", "max_gen_toks": 3, "do_sample": False, "temperature": 1}, 9) == (3, ("a",), greedy)
    assert generation({"temperature": 0.5, "top_k": 4}, 9).sampling == Sampling(0.5, 4, 1.0)
    assert generation({"do_sample": True, "top_p": 0.9}, 9).sampling == Sampling(1.0, 0, 0.9)
    for wrong in ({"num_beams": 4}, {"max_gen_toks": 0}, {"do_sample": True, "top_p": 0}, {"until": [3]}):
        with pytest.raises(UserError, match=next(iter({*wrong} - {"do_sample"}))):
            generation(wrong, 9)
    assert cut("abcdef", ["ef", "cd", "x"]) == "ab" and cut("abc", []) == "abc"
