"""The architecture of models that none of `transformers` fits: config.json has jaxlm's own keys, and
`modeling_jaxlm.py` beside it computes them in PyTorch.
"""

from pathlib import Path
from typing import Any

from jaxlm.config import ModelConfig, UserError, flatten
from jaxlm.interop.config_json import UNREAD, Family, Hf, Reader
from jaxlm.model import Params

KIND = "jaxlm"
MODELING = Path(__file__).with_name("hub") / "modeling_jaxlm.py"  # imports torch, so nothing here imports it
# Keys that the weights' results do not depend on, apart from rounding.
FREE = ("dtype", "param_dtype", "dropout", "remat", "attention", "matmul_precision", "scan_unroll", "residual_init")
FREE = (*FREE, "vocab_multiple", "lora_rank", "lora_alpha", "lora_targets", "lora_dropout")  # LoRA is merged
FREE = (*FREE, "encoder_layers", "encoder_len")  # only decoders are written


def _write(c: ModelConfig) -> Hf:
    """The keys of the model, and the names under which other programs look for its sizes."""
    return {
        "auto_map": {
            "AutoConfig": f"{MODELING.stem}.JaxlmConfig",
            "AutoModelForCausalLM": f"{MODELING.stem}.JaxlmForCausalLM",
        },
        "model": {key: value for key, value in flatten(c).items() if key not in FREE},
        "num_hidden_layers": c.num_layers,
        "hidden_size": c.d_model,
        "num_attention_heads": c.num_heads,
        "num_key_value_heads": c.kv_heads,
        "head_dim": c.head_size,
        "intermediate_size": c.mlp_width,
    }


def _read(hf: Reader) -> dict[str, Any]:
    keys = {f"model.{key}": value for key, value in hf.table("model").items()}
    known = {f"model.{key}" for key in ModelConfig.__dataclass_fields__ if key not in FREE}
    for names, what in ((keys.keys() - known, "has"), (known - keys.keys() - UNREAD.keys(), "lacks")):
        if names:
            raise UserError(f"{hf.name}: {what} the key {min(names)}; allowed: those that jaxlm writes")
    return keys | {"seq_len": hf.number("max_position_embeddings")}


def used_rows(params: Params, vocab_size: int) -> Params:
    """The parameters without rows of token tables that have no token (`model.vocab_multiple`)."""
    params = {**params, "embed": {"embedding": params["embed"]["embedding"][:vocab_size]}}
    return params | {"head": {"kernel": params["head"]["kernel"][:, :vocab_size]}} if "head" in params else params


FAMILY = Family("JaxlmForCausalLM", False, _read, _write)
