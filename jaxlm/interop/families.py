"""The families of models that can be imported and exported: their config.json as keys of a jaxlm configuration.

A family reads what changes its results and refuses what jaxlm's model cannot do, so that no import computes something
else than the original. The names of keys are those of `transformers`, versions 4 and 5. The last family is jaxlm's own,
which has every model.
"""

import math
from typing import Any

from jaxlm.config import ModelConfig, UserError, show
from jaxlm.interop import own_model
from jaxlm.interop.config_json import UNREAD, Family, Hf, Reader

GPT2_ACTIVATIONS = ("gelu_new", "gelu_pytorch_tanh")  # GELU by its tanh approximation


def keys_of(hf: Reader) -> tuple[Family, dict[str, Any]]:
    """The family of a config.json, and the keys of the model that it describes, and seq_len.

    Raises:
      UserError: jaxlm does not know the architecture, or cannot do something that the file asks for.
    """
    kind = hf.require("model_type", None, *FAMILIES)
    family = FAMILIES[kind]
    tied = hf.get("tie_word_embeddings", family.tied)
    return family, UNREAD | {"model.tie_embeddings": bool(tied)} | family.read(hf)


def _sizes(hf: Reader) -> dict[str, Any]:
    """The keys that all families but GPT-2 share."""
    heads, width = hf.number("num_attention_heads"), hf.number("hidden_size")
    head = hf.get("head_dim", 0)
    return {
        "model.num_layers": hf.number("num_hidden_layers"),
        "model.d_model": width,
        "model.num_heads": heads,
        "model.num_kv_heads": hf.get("num_key_value_heads", 0),
        "model.head_dim": 0 if head * heads == width else head,
        "model.d_ff": hf.number("intermediate_size"),
        "model.activation": "swiglu",
        "model.norm": "rmsnorm",
        "model.norm_eps": _eps(hf.number("rms_norm_eps"), 1e-6),
        "model.position": "rope",
        "seq_len": hf.number("max_position_embeddings"),
    }


def _eps(eps: float, own: float) -> float:
    """0 stands for the value that a norm has by itself."""
    return 0.0 if eps == own else eps


def _rope(rope: Reader, context: int) -> dict[str, Any]:
    kind = "rope_type" if rope.get("rope_type") else "type"  # the older name
    found = rope.require(kind, "default", "default", "linear", "llama3", "longrope", "su")
    scaling = {"default": "none", "su": "longrope"}.get(found, found)
    keys: dict[str, Any] = {"model.rope_theta": float(rope.number("rope_theta")), "model.rope_scaling": scaling}
    if scaling == "longrope":
        return keys | _longrope(rope, context)
    if scaling != "none":
        keys["model.rope_factor"] = float(rope.number("factor"))
    if scaling == "llama3":
        rope.require("low_freq_factor", None, 1, 1.0)
        rope.require("high_freq_factor", None, 4, 4.0)
        keys["model.rope_original"] = rope.number("original_max_position_embeddings")
    return keys


def _longrope(rope: Reader, context: int) -> dict[str, Any]:
    original = rope.number("original_max_position_embeddings")
    factor = rope.get("factor", context / original)
    growth = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 < original else 1.0
    if not math.isclose(rope.get("attention_factor", growth), growth, rel_tol=1e-6):
        raise UserError(f"{rope.name}: attention_factor is {rope.get('attention_factor')}; allowed: {growth}")
    keys: dict[str, Any] = {"model.rope_original": original, "model.rope_factor": float(factor)}
    for length in ("short", "long"):
        numbers = rope.get(f"{length}_factor")
        if not isinstance(numbers, list) or not all(type(n) in (int, float) for n in numbers):
            raise UserError(f"{rope.name}: {length}_factor is {show(numbers)}; allowed: a list of numbers")
        keys[f"model.rope_{length}"] = " ".join(str(float(n)) for n in numbers)
    return keys


def _written_rope(c: ModelConfig) -> Hf:
    base: Hf = {"rope_theta": c.rope_theta}
    match c.rope_scaling:
        case "none":
            return base
        case "linear":
            return base | {"rope_scaling": {"rope_type": "linear", "factor": c.rope_factor}}
        case "llama3":
            scaling = {"rope_type": "llama3", "factor": c.rope_factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
            return base | {"rope_scaling": scaling | {"original_max_position_embeddings": c.rope_original}}
        case "longrope":
            factors = {f"{n}_factor": [float(x) for x in getattr(c, f"rope_{n}").split()] for n in ("short", "long")}
            original = {"original_max_position_embeddings": c.rope_original}
            return base | original | {"rope_scaling": {"rope_type": "longrope", **factors, **original}}


def _llama(hf: Reader, **rope: Any) -> dict[str, Any]:
    """What Llama and its relatives share; `rope` are defaults of RoPE's keys."""
    hf.require("hidden_act", "silu", "silu", "swish")
    for key in ("attention_bias", "mlp_bias", "rope_interleaved", "use_sliding_window"):
        hf.require(key, False, False)
    keys = _sizes(hf)
    return keys | _rope(hf.rope(**rope), keys["seq_len"])


def _mistral(hf: Reader) -> dict[str, Any]:
    return _llama(hf) | {"model.window": hf.get("sliding_window", 0)}


def _qwen2(hf: Reader) -> dict[str, Any]:
    return _llama(hf) | {"model.qkv_bias": True}


def _qwen3(hf: Reader) -> dict[str, Any]:
    return _llama(hf) | {"model.qk_norm": True}


def _phi3(hf: Reader) -> dict[str, Any]:
    original = hf.get("original_max_position_embeddings", 4096)
    fraction = hf.rope().get("partial_rotary_factor", hf.get("partial_rotary_factor", 1.0))
    return _llama(hf, original_max_position_embeddings=original) | {
        "model.window": hf.get("sliding_window", 0),
        "model.rope_fraction": fraction,
    }


def _gemma2(hf: Reader) -> dict[str, Any]:
    hf.require("hidden_activation", "gelu_pytorch_tanh", "gelu_pytorch_tanh")
    hf.require("attention_bias", False, False)
    keys = _sizes(hf) | {
        "model.activation": "geglu",
        "model.post_norms": True,
        "model.scale_embeddings": True,
        "model.score_dim": hf.number("query_pre_attn_scalar"),
        "model.window": hf.number("sliding_window"),
        "model.global_every": 2,
        "model.attention_softcap": hf.get("attn_logit_softcapping", 0.0),
        "model.logit_softcap": hf.get("final_logit_softcapping", 0.0),
    }
    return _layers(hf, keys) | _rope(hf.rope(), keys["seq_len"])


def _gemma3(hf: Reader) -> dict[str, Any]:
    hf.require("use_bidirectional_attention", False, False)
    keys = _gemma2(hf) | {"model.qk_norm": True, "model.global_every": hf.get("sliding_window_pattern", 6)}
    local = hf.rope("sliding_attention").get("rope_theta") if hf.get("rope_parameters") else None
    keys["model.rope_local_theta"] = float(hf.get("rope_local_base_freq", local or 10_000.0))
    return _layers(hf, keys)


def _layers(hf: Reader, keys: dict[str, Any]) -> dict[str, Any]:
    """Takes the pattern of layers from layer_types, if that is there. Raises UserError if it is not periodic."""
    kinds = hf.get("layer_types", [])
    if not kinds:
        return keys
    if not isinstance(kinds, list):
        raise UserError(f"{hf.name}: layer_types is {show(kinds)}; allowed: a list of kinds of layers")
    every = kinds.index("full_attention") + 1 if "full_attention" in kinds else 0
    wanted = ["full_attention" if every and i % every == 0 else "sliding_attention" for i in range(1, len(kinds) + 1)]
    if kinds != wanted or len(kinds) != keys["model.num_layers"]:
        raise UserError(f"{hf.name}: layer_types is {show(kinds)}; allowed: every n-th layer full_attention")
    return keys | {"model.global_every": every}


def _gpt2(hf: Reader) -> dict[str, Any]:
    hf.require("activation_function", "gelu_new", *GPT2_ACTIVATIONS)
    hf.require("scale_attn_weights", True, True)
    hf.require("scale_attn_by_inverse_layer_idx", False, False)
    return {
        "model.num_layers": hf.number("n_layer"),
        "model.d_model": hf.number("n_embd"),
        "model.num_heads": hf.number("n_head"),
        "model.d_ff": hf.get("n_inner", 0),
        "model.activation": "gelu",
        "model.norm": "layernorm",
        "model.norm_eps": _eps(hf.get("layer_norm_epsilon", 1e-5), 1e-5),
        "model.position": "learned",
        "model.use_bias": True,
        "seq_len": hf.number("n_positions"),
    }


def _write_gpt2(c: ModelConfig) -> Hf:
    return {
        "n_layer": c.num_layers,
        "n_embd": c.d_model,
        "n_head": c.num_heads,
        "n_inner": c.mlp_width,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": c.norm_eps or 1e-5,
    }


def _write_sizes(c: ModelConfig) -> Hf:
    return {
        "num_hidden_layers": c.num_layers,
        "hidden_size": c.d_model,
        "num_attention_heads": c.num_heads,
        "num_key_value_heads": c.kv_heads,
        "head_dim": c.head_size,
        "intermediate_size": c.mlp_width,
        "rms_norm_eps": c.norm_eps or 1e-6,
        "hidden_act": "silu",
        "attention_dropout": 0.0,
        **_written_rope(c),
    }


def _write_windowed(c: ModelConfig) -> Hf:
    return _write_sizes(c) | {"sliding_window": c.window or None}


def _write_phi3(c: ModelConfig) -> Hf:
    return _write_windowed(c) | {"partial_rotary_factor": c.rope_fraction, "pad_token_id": None}


def _write_gemma2(c: ModelConfig) -> Hf:
    period = c.global_every
    kinds = [
        "full_attention" if period and i % period == 0 else "sliding_attention" for i in range(1, c.num_layers + 1)
    ]
    return _write_sizes(c) | {
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": c.score_dim or c.head_size,
        "sliding_window": c.window,
        "layer_types": kinds,
        "attn_logit_softcapping": c.attention_softcap or None,
        "final_logit_softcapping": c.logit_softcap or None,
    }


def _write_gemma3(c: ModelConfig) -> Hf:
    return _write_gemma2(c) | {
        "rope_local_base_freq": c.rope_local_theta or c.rope_theta,
        "sliding_window_pattern": c.global_every,
    }


FAMILIES: dict[str, Family] = {
    "gpt2": Family("GPT2LMHeadModel", True, _gpt2, _write_gpt2),
    "llama": Family("LlamaForCausalLM", False, _llama, _write_sizes),  # Llama 2 and 3, SmolLM2
    "mistral": Family("MistralForCausalLM", False, _mistral, _write_windowed),
    "qwen2": Family("Qwen2ForCausalLM", False, _qwen2, _write_sizes),  # Qwen 2 and 2.5
    "qwen3": Family("Qwen3ForCausalLM", False, _qwen3, _write_sizes),
    "gemma2": Family("Gemma2ForCausalLM", True, _gemma2, _write_gemma2),
    "gemma3_text": Family("Gemma3ForCausalLM", True, _gemma3, _write_gemma3),
    "phi3": Family("Phi3ForCausalLM", False, _phi3, _write_phi3),  # Phi-3 and Phi-4-mini
    own_model.KIND: own_model.FAMILY,
}
