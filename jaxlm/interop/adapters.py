"""Writes LoRA as an adapter that `peft` loads onto the model that training started from.

`peft` has A transposed, [r, in], and B, [out, r], for each linear layer of its model. Where that layer is several of
ours side by side (GPT-2's c_attn, Phi-3's qkv_proj), their ranks add up: A stacks theirs, B is block diagonal, and
alpha grows with the rank, so that the factor alpha / rank stays.
"""

import json
import math
from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors.numpy import save_file

from jaxlm.config import ModelConfig, UserError
from jaxlm.interop import own_model
from jaxlm.interop.exporting import described, nearest, original
from jaxlm.interop.folder import check_new, whole_folder
from jaxlm.interop.tensors import Source, sources
from jaxlm.model import lora
from jaxlm.run.open_run import Run
from jaxlm.train import trained

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"  # peft's names


def export_adapter(run: Run, destination: Path, base: str | None = None) -> int:
    """Writes the folder whole or not at all. Returns the number of adapted layers.

    Args:
      base: the name or path of the original model, for peft's configuration.

    Raises:
      UserError: the run has no LoRA, trained more than LoRA, or no architecture of `transformers` has its model.
    """
    c = run.config.model
    if not c.lora_rank:
        raise UserError(f"--adapter: {run.folder} has model.lora_rank=0; allowed: a run with LoRA")
    flat = {"/".join(k.key for k in path): x for path, x in jax.tree_util.tree_leaves_with_path(run.params)}
    if others := [name for name in flat if trained.trains(run.config, name) and not name.endswith((lora.A, lora.B))]:
        raise UserError(
            f"--adapter: {run.folder} trained {others[0]} too (optim.freeze is {run.config.optim.freeze!r}); allowed: a"
            " run that trained LoRA alone, or an export without --adapter"
        )
    check_new("DST", destination)
    kind, _ = described(c, run.config.seq_len, original(run))
    if kind == own_model.KIND:
        raise UserError(f"--adapter: no architecture of transformers has this model; {nearest(c, run.config.seq_len)}")
    modules = _modules(kind, c)
    with whole_folder("DST", destination) as temporary:
        temporary.mkdir()
        tensors: dict[str, np.ndarray] = {}
        for layer in range(c.num_layers):
            for name, parts in modules.items():
                a, b = _joined(c, flat, parts, layer)
                prefix = f"base_model.model.{name.format(l=layer)}"
                tensors |= {f"{prefix}.lora_A.weight": a, f"{prefix}.lora_B.weight": b}
        save_file(tensors, temporary / WEIGHTS, {"format": "pt"})
        (temporary / CONFIG).write_text(json.dumps(_config(kind, c, modules, base), indent=2) + "\n")
    return len(tensors) // 2


Parts = list[tuple[str, Source]]  # of a layer of the original model: our linear layers in it


def _modules(kind: str, c: ModelConfig) -> dict[str, Parts]:
    """{name of a layer of the original model: its parts}, of all layers where at least one part has LoRA."""
    found: dict[str, Parts] = {}
    for path, source in sources(kind, c, "transformer." if kind == "gpt2" else "").items():
        if path.startswith("layers/") and path.endswith("/kernel"):
            found.setdefault(source.name.removesuffix(".weight"), []).append((path.removesuffix("/kernel"), source))
    return {
        name: parts for name, parts in found.items() if any(c.has_lora(path.rpartition("/")[2]) for path, _ in parts)
    }


def _adapted(c: ModelConfig, parts: Parts) -> list[str]:
    return [path for path, _ in parts if c.has_lora(path.rpartition("/")[2])]


def _joined(c: ModelConfig, flat: dict[str, Any], parts: Parts, layer: int) -> tuple[np.ndarray, np.ndarray]:
    """A `[n r, in]` and B `[out, n r]` of a layer of the original model with n adapted parts."""
    adapted, r = _adapted(c, parts), c.lora_rank
    a = [np.asarray(flat[f"{path}/{lora.A}"][layer], np.float32).T for path in adapted]
    outputs = sum(flat[f"{path}/kernel"].shape[-1] for path, _ in parts)
    b = np.zeros((outputs, len(adapted) * r), np.float32)
    for path, source in parts:
        if path in adapted:
            i, part = adapted.index(path), np.asarray(flat[f"{path}/{lora.B}"][layer], np.float32).T
            b[source.start : source.start + len(part), i * r : (i + 1) * r] = part
    return np.ascontiguousarray(np.concatenate(a)), b  # safetensors writes the memory as it is


def _config(kind: str, c: ModelConfig, modules: dict[str, Parts], base: str | None) -> dict[str, Any]:
    names = {name.rpartition(".")[2]: len(_adapted(c, parts)) for name, parts in modules.items()}
    joined = {name: n for name, n in names.items() if n > 1}
    alpha = int(c.lora_alpha) if math.floor(c.lora_alpha) == c.lora_alpha else c.lora_alpha
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": c.lora_rank,
        "lora_alpha": alpha,
        "lora_dropout": c.lora_dropout,
        "target_modules": _targets(kind, modules),
        "rank_pattern": {name: n * c.lora_rank for name, n in joined.items()},
        "alpha_pattern": {name: n * alpha for name, n in joined.items()},
        "fan_in_fan_out": kind == "gpt2",  # its layers are Conv1D
        "bias": "none",
        "use_rslora": False,
        "use_dora": False,
        "inference_mode": True,
    }


def _targets(kind: str, modules: dict[str, Parts]) -> list[str]:
    """Names that match these layers and no others: GPT-2 has two that are named c_proj."""
    names = [name.partition("{l}.")[2] if kind == "gpt2" else name.rpartition(".")[2] for name in modules]
    return sorted(names)
