"""Which tensor of a Hugging Face model, or which part of one, is which parameter.

A parameter of the layers is stacked, [L, ...]; its files have a tensor for each layer. Linear layers are transposed
there, [out, in], except for GPT-2's. Gemma's norms multiply by 1 + w, so that 1 is added to w here.
"""

from typing import Any, Literal, NamedTuple

import ml_dtypes
import numpy as np

from jaxlm.config import ModelConfig

Dtype = Literal["float32", "bfloat16"]
DTYPES: dict[Dtype, Any] = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16}


class Source(NamedTuple):
    """Where a parameter is. `{l}` in the name stands for the layer."""

    name: str
    transposed: bool = False
    plus_one: bool = False
    start: int = 0  # of the parameter's part among the tensor's outputs
    stop: int = 0  # 0 = it has all of them

    def taken(self, tensor: np.ndarray) -> np.ndarray:
        """The parameter, float32, from the tensor."""
        axis = 0 if self.transposed or tensor.ndim == 1 else 1
        if self.stop:
            tensor = tensor[(slice(None),) * axis + (slice(self.start, self.stop),)]
        x = np.asarray(tensor, np.float32)
        return (x.T if self.transposed else x) + (1.0 if self.plus_one else 0.0)

    def given(self, parameter: np.ndarray) -> np.ndarray:
        """The tensor, or its part, from the parameter."""
        x = parameter - 1.0 if self.plus_one else parameter
        return x.T if self.transposed else x


Sources = dict[str, Source]  # {the parameter's path: where it is}


def sources(kind: str, c: ModelConfig, prefix: str = "") -> Sources:
    """The sources of all parameters of a model of the family `kind`.

    Args:
      prefix: GPT-2: what begins all names of tensors, "" or "transformer.".
    """
    found = _gpt2(c, prefix) if kind == "gpt2" else _llama(kind, c)
    if kind == "jaxlm":
        found |= _beside_llama(found, c)
    if not c.tie_embeddings:
        found["head/kernel"] = Source("lm_head.weight", transposed=True)
    return found


def _gpt2(c: ModelConfig, prefix: str) -> Sources:
    D = c.d_model
    found = {
        "embed/embedding": Source(f"{prefix}wte.weight"),
        "positions/embedding": Source(f"{prefix}wpe.weight"),
        **_norm("final_norm", f"{prefix}ln_f"),
        **_norm("layers/attention_norm", f"{prefix}h.{{l}}.ln_1"),
        **_norm("layers/mlp_norm", f"{prefix}h.{{l}}.ln_2"),
    }
    linear = {"attention/out": "attn.c_proj", "mlp/up": "mlp.c_fc", "mlp/down": "mlp.c_proj"}
    for name, theirs in linear.items():
        found[f"layers/{name}/kernel"] = Source(f"{prefix}h.{{l}}.{theirs}.weight")
        found[f"layers/{name}/bias"] = Source(f"{prefix}h.{{l}}.{theirs}.bias")
    for i, name in enumerate(("query", "key", "value")):
        part: dict[str, Any] = {"start": i * D, "stop": (i + 1) * D}
        found[f"layers/attention/{name}/kernel"] = Source(f"{prefix}h.{{l}}.attn.c_attn.weight", **part)
        found[f"layers/attention/{name}/bias"] = Source(f"{prefix}h.{{l}}.attn.c_attn.bias", **part)
    return found


def _norm(ours: str, theirs: str) -> Sources:
    return {f"{ours}/scale": Source(f"{theirs}.weight"), f"{ours}/bias": Source(f"{theirs}.bias")}


def _llama(kind: str, c: ModelConfig) -> Sources:
    gemma, layer = kind.startswith("gemma"), "model.layers.{l}."
    norms = {"attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}
    if c.post_norms:
        norms |= {
            "attention_post_norm": "post_attention_layernorm",
            "mlp_norm": "pre_feedforward_layernorm",
            "mlp_post_norm": "post_feedforward_layernorm",
        }
    if c.qk_norm:
        norms |= {"attention/query_norm": "self_attn.q_norm", "attention/key_norm": "self_attn.k_norm"}
    found = {f"layers/{ours}/scale": Source(f"{layer}{name}.weight", plus_one=gemma) for ours, name in norms.items()}
    found["final_norm/scale"] = Source("model.norm.weight", plus_one=gemma)
    found["embed/embedding"] = Source("model.embed_tokens.weight")
    found["layers/attention/out/kernel"] = Source(f"{layer}self_attn.o_proj.weight", transposed=True)
    found["layers/mlp/down/kernel"] = Source(f"{layer}mlp.down_proj.weight", transposed=True)
    if kind == "phi3":
        return found | _joined(c, layer)
    for ours, name in {"query": "q", "key": "k", "value": "v"}.items():
        found[f"layers/attention/{ours}/kernel"] = Source(f"{layer}self_attn.{name}_proj.weight", transposed=True)
        if c.qkv_bias:
            found[f"layers/attention/{ours}/bias"] = Source(f"{layer}self_attn.{name}_proj.bias")
    for name in ("up", "gate") if "gate" in c.linear_layers else ("up",):
        found[f"layers/mlp/{name}/kernel"] = Source(f"{layer}mlp.{name}_proj.weight", transposed=True)
    return found


def _beside_llama(found: Sources, c: ModelConfig) -> Sources:
    """What jaxlm's own architecture may have and Llama's relatives do not: learned positions, and more biases."""
    beside = {"positions/embedding": Source("model.embed_positions.weight")} if c.position == "learned" else {}
    if not c.use_bias:
        return beside
    biased = [path for path in found if path.endswith("/kernel")]
    if c.norm == "layernorm":
        biased += [path for path in found if path.endswith("_norm/scale") and "/attention/" not in path]
    names = {path.rpartition("/")[0]: found[path].name.removesuffix("weight") for path in biased}
    return beside | {f"{path}/bias": Source(f"{name}bias") for path, name in names.items()}


def _joined(c: ModelConfig, layer: str) -> Sources:
    """Phi-3 has one tensor for query, key and value, and one for gate and up."""
    found, start = {}, 0
    for ours, heads in {"query": c.num_heads, "key": c.kv_heads, "value": c.kv_heads}.items():
        stop = start + heads * c.head_size
        name = f"{layer}self_attn.qkv_proj.weight"
        found[f"layers/attention/{ours}/kernel"] = Source(name, transposed=True, start=start, stop=stop)
        start = stop
    for i, ours in enumerate(("gate", "up")):
        part: dict[str, Any] = {"start": i * c.mlp_width, "stop": (i + 1) * c.mlp_width}
        found[f"layers/mlp/{ours}/kernel"] = Source(f"{layer}mlp.gate_up_proj.weight", transposed=True, **part)
    return found
