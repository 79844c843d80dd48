"""Small random models of each family: the logits of `transformers` after an import, and again after an export."""

import importlib
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from jaxlm.interop.exporting import export_model
from jaxlm.interop.importing import import_model
from jaxlm.model import make_model
from jaxlm.run.open_run import Run, open_run
from tests.decoders import logits_of

pytestmark = pytest.mark.peers

ROWS, LENGTH = 40, 40  # longer than the windows and the first contexts below
SIZES: dict[str, Any] = {
    "vocab_size": ROWS, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "pad_token_id": 0,
}  # fmt: skip
GEMMA = SIZES | {"head_dim": 12, "query_pre_attn_scalar": 10, "sliding_window": 7}
LLAMA3 = {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 16, "rope_theta": 500.0}  # fmt: skip
LONGROPE = {"rope_type": "longrope", "rope_theta": 100.0, "partial_rotary_factor": 0.75,
            "short_factor": [1.0, 1.5, 2.0], "long_factor": [2.0, 4.0, 7.0]}  # fmt: skip
THETA = {"rope_type": "default", "rope_theta": 300.0}
TIED = SIZES | {"tie_word_embeddings": True}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("GPT2", {"vocab_size": ROWS, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64}),
    "llama 2": ("Llama", SIZES),
    "llama 3": ("Llama", SIZES | {"rope_parameters": LLAMA3}),
    "smollm2": ("Llama", TIED | {"rope_parameters": THETA}),
    "mistral": ("Mistral", SIZES | {"sliding_window": 9}),
    "nemo": ("Mistral", SIZES | {"sliding_window": None, "head_dim": 16}),
    "qwen2": ("Qwen2", TIED),
    "qwen3": ("Qwen3", SIZES | {"head_dim": 12}),
    "gemma2": ("Gemma2", GEMMA | {"final_logit_softcapping": 3.0, "attn_logit_softcapping": 2.0}),
    "gemma3": ("Gemma3Text", GEMMA | {
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 500.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 50.0},
        },
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"],
    }),
    "phi3": ("Phi3", SIZES | {"sliding_window": 11}),
    "phi4": ("Phi3", TIED | {"rope_parameters": LONGROPE, "original_max_position_embeddings": 16}),
}  # fmt: skip


def peers() -> tuple[Any, Any]:
    return importlib.import_module("torch"), importlib.import_module("transformers")


def make(name: str) -> Any:
    """A random model of `transformers`, with every parameter away from its initial value."""
    torch, transformers = peers()
    kind, sizes = MODELS[name]
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**sizes, attn_implementation="eager")
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return model.eval()


def tokens(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, ROWS, (2, LENGTH)).astype(np.int32)


def theirs(model: Any, tokens_BT: np.ndarray) -> np.ndarray:
    torch, _ = peers()
    with torch.no_grad():
        return model(torch.tensor(tokens_BT, dtype=torch.long)).logits.numpy()


def ours(run: Run, tokens_BT: np.ndarray) -> np.ndarray:
    model = make_model(run.config.model, run.vocab_size, run.config.seq_len)
    return np.asarray(jax.jit(logits_of(model))(run.params, tokens_BT))


@pytest.mark.parametrize("name", MODELS)
def test_logits_are_the_same_both_ways(name: str, tmp_path: Path) -> None:
    torch, transformers = peers()
    model = make(name)
    model.save_pretrained(tmp_path / "hf", max_shard_size="20KB" if name == "llama 2" else "5GB")
    found = import_model(tmp_path / "hf", tmp_path / "run")
    assert found.vocab_size == ROWS and found.parameters == sum(p.numel() for p in model.parameters())
    run = open_run(tmp_path / "run", None)
    for length in (LENGTH, 12):  # beyond the windows and the first contexts, and within the contexts
        tokens_BT = tokens()[:, :length]
        want = theirs(model, tokens_BT)
        assert want.std() > 0.1
        np.testing.assert_allclose(ours(run, tokens_BT), want, rtol=0, atol=1e-4 * max(1, np.abs(want).max() / 10))

    assert export_model(run, tmp_path / "back") == type(model).__name__
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "back", attn_implementation="eager")
    for key, value in model.state_dict().items():
        torch.testing.assert_close(again.state_dict()[key], value, rtol=0, atol=1e-6)
    prompt = torch.tensor(tokens()[:, :20], dtype=torch.long)
    greedy: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    np.testing.assert_array_equal(again.generate(prompt, **greedy), model.generate(prompt, **greedy))
    np.testing.assert_allclose(theirs(again, tokens(1)), theirs(model, tokens(1)), rtol=0, atol=1e-5)
