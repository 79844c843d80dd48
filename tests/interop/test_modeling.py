"""Models that no architecture of `transformers` has: it computes them with the modeling_jaxlm.py of an export."""

import importlib
from typing import Any

import jax
import numpy as np
import pytest

from jaxlm.interop import own_model
from jaxlm.interop.exporting import export_model
from jaxlm.model.generate import generate
from jaxlm.run.open_run import Run
from tests.decoders import logits_of, some_tokens
from tests.interop.own_models import OWN
from tests.interop.test_interop import make_run

pytestmark = pytest.mark.peers

CONTEXT = 32  # of make_run


@pytest.fixture(scope="module", params=OWN)
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, Any]:
    """A run with random parameters, and its export as `transformers` loads it."""
    transformers = importlib.import_module("transformers")
    folder = tmp_path_factory.mktemp(request.param)
    with pytest.MonkeyPatch.context() as patch:  # it copies the folder's code there
        patch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(folder / "modules"))
        run = make_run(folder / "run", OWN[request.param])
        assert export_model(run, folder / "hf") == own_model.FAMILY.architecture
        model = transformers.AutoModelForCausalLM.from_pretrained(folder / "hf", trust_remote_code=True)
    return run, model


def theirs(model: Any, tokens_BT: np.ndarray, **inputs: Any) -> np.ndarray:
    torch = importlib.import_module("torch")
    with torch.no_grad():
        return model(torch.tensor(tokens_BT, dtype=torch.long), **inputs).logits.numpy()


def continued(model: Any, tokens_BT: np.ndarray, count: int, mask_BT: Any = None, **how: Any) -> np.ndarray:
    """The tokens of greatest probability. Without a mask, `generate` would take tokens with pad_token_id as padding."""
    torch = importlib.import_module("torch")
    mask = torch.tensor(np.ones_like(tokens_BT) if mask_BT is None else mask_BT)
    greedy = {"max_new_tokens": count, "do_sample": False, "eos_token_id": None, "pad_token_id": 0, **how}
    return model.generate(torch.tensor(tokens_BT, dtype=torch.long), attention_mask=mask, **greedy)[:, -count:].numpy()


@pytest.mark.parametrize("length", [CONTEXT, 6])  # beyond the windows and rope_original, and within
def test_logits_are_the_same(exported: tuple[Run, Any], length: int) -> None:
    run, model = exported
    tokens_BT = some_tokens(2, length)
    want = np.asarray(jax.jit(logits_of(run.model))(run.params, tokens_BT))
    assert want.std() > 0.1
    np.testing.assert_allclose(theirs(model, tokens_BT), want, rtol=0, atol=1e-4)


def test_greedy_tokens_are_the_same_with_and_without_a_cache(exported: tuple[Run, Any]) -> None:
    """Beyond the context too."""
    run, model = exported
    prompt_BT, count = some_tokens(3, 20), CONTEXT
    want = generate(run.model, run.params, prompt_BT, jax.random.key(0), max_new_tokens=count, temperature=0)
    assert len({tuple(row) for row in want.tolist()}) > 1
    np.testing.assert_array_equal(continued(model, prompt_BT, count), want)
    np.testing.assert_array_equal(continued(model, prompt_BT, count, use_cache=False), want)


def test_padding_is_not_seen(exported: tuple[Run, Any]) -> None:
    torch = importlib.import_module("torch")
    _, model = exported
    tokens_BT, padded = some_tokens(2, 20), 7
    mask_BT = np.ones_like(tokens_BT)
    mask_BT[0, :padded] = 0
    short, whole = continued(model, tokens_BT[:1, padded:], 20), continued(model, tokens_BT[1:], 20)
    found = continued(model, tokens_BT, 20, mask_BT)
    np.testing.assert_array_equal(found, np.concatenate([short, whole]))

    alone = theirs(model, tokens_BT[:1, padded:])
    found = theirs(model, tokens_BT, attention_mask=torch.tensor(mask_BT))[:1, padded:]
    np.testing.assert_allclose(found, alone, rtol=0, atol=1e-5)
    mask_BT = np.flip(mask_BT, axis=1).copy()  # after the text
    alone = theirs(model, tokens_BT[:1, :-padded])
    found = theirs(model, tokens_BT, attention_mask=torch.tensor(mask_BT))[:1, :-padded]
    np.testing.assert_allclose(found, alone, rtol=0, atol=1e-5)


def test_what_the_model_cannot_do_is_refused(exported: tuple[Run, Any]) -> None:
    torch = importlib.import_module("torch")
    run, model = exported
    with pytest.raises(ValueError, match=r"attention_mask has shape \[2, 1, 5, 5\]; allowed: \[2, 5\]"):
        theirs(model, some_tokens(2, 5), attention_mask=torch.ones(2, 1, 5, 5))
    with pytest.raises(ValueError, match="attention_mask has shape"):
        continued(model, some_tokens(2, 5), 2, cache_implementation="static")
    if run.config.model.position != "rope":
        with pytest.raises(ValueError, match="position 32; allowed: less than max_position_embeddings=32"):
            theirs(model, some_tokens(1, CONTEXT + 1))


def test_losses_have_gradients(exported: tuple[Run, Any]) -> None:
    torch = importlib.import_module("torch")
    _, model = exported
    tokens_BT = torch.tensor(some_tokens(2, 12), dtype=torch.long)
    out = model(tokens_BT, labels=tokens_BT)
    want = torch.nn.functional.cross_entropy(out.logits[:, :-1].flatten(0, 1), tokens_BT[:, 1:].flatten())
    torch.testing.assert_close(out.loss, want)
    out.loss.backward()
    names = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().max() > 0]
    assert names == []
