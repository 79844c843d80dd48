"""Writes the model of a workdir as `transformers` reads it: config.json, safetensors, the tokenizer."""

import dataclasses
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxlm.checkpoint import workdirs
from jaxlm.config import ModelConfig, UserError, flatten
from jaxlm.config.pretrained import named_weights
from jaxlm.data.tokenizers.shipped import BESIDE
from jaxlm.interop import own_model, own_tokenizers, shards
from jaxlm.interop.config_json import Hf, Reader
from jaxlm.interop.families import FAMILIES, keys_of
from jaxlm.interop.folder import check_new, whole_folder
from jaxlm.interop.importing import GENERATION, MODEL_TYPE, read_json
from jaxlm.interop.tensors import DTYPES, Dtype, Source, sources
from jaxlm.model import Params, lora
from jaxlm.run.open_run import Run


def export_model(run: Run, destination: Path, dtype: Dtype = "float32") -> str:
    """Writes the folder whole or not at all. Returns the architecture: jaxlm's own if `transformers` has none.

    Raises:
      UserError: the folder is there.
    """
    check_new("DST", destination)
    c = run.config.model
    kind, hf = described(c, run.config.seq_len, original(run))
    own = kind == own_model.KIND
    params = own_model.used_rows(run.params, run.vocab_size) if own else run.params
    hf |= {"vocab_size": len(params["embed"]["embedding"]), "torch_dtype": dtype, **special_ids(run)}
    with whole_folder("DST", destination) as temporary:
        temporary.mkdir()
        (temporary / "config.json").write_text(json.dumps(hf, indent=2) + "\n")
        shards.write(temporary, _tensors(kind, c, params, dtype))
        if own:
            shutil.copyfile(own_model.MODELING, temporary / own_model.MODELING.name)
        _write_tokenizer(run, temporary)
    return hf["architectures"][0]


def original(run: Run) -> str | None:
    """The family that the model was imported from, if this run or the one that it started from was imported."""
    start = named_weights(run.config.checkpoint.resume)
    folders = [run.folder, *([start.workdir] if start else [])]
    kinds = [workdirs.read_facts(folder).get(MODEL_TYPE) for folder in folders if (folder / "config.json").is_file()]
    return next(filter(None, kinds), None)


def described(c: ModelConfig, seq_len: int, original: str | None = None) -> tuple[str, Hf]:
    """The family that a model belongs to, and its config.json without what the weights say.

    Args:
      original: the family that it was imported from, which is tried first.
    """
    return next((kind, hf) for kind, hf, changes in _tried(c, seq_len, original) if not changes)


def nearest(c: ModelConfig, seq_len: int) -> str:
    """The architecture of `transformers` that differs in the fewest keys, and what they would have to be."""
    tried = [(kind, changes) for kind, _, changes in _tried(c, seq_len) if kind != own_model.KIND]
    kind, changes = min(tried, key=lambda found: len(found[1]))
    wanted = _results(c)
    keys = [f"model.{key}={value} instead of {wanted.get(key)}" for key, value in changes.items() if value is not None]
    return f"the nearest is {FAMILIES[kind].architecture}; allowed, to be set before training: {', '.join(keys)}"


def _tried(c: ModelConfig, seq_len: int, original: str | None = None) -> Iterator[tuple[str, Hf, dict[str, Any]]]:
    """Each family, with the model's config.json in it, and the keys that differ, with the values that it would have."""
    wanted = _results(c)
    context = max(seq_len, round(c.rope_original * c.rope_factor))
    first = ["phi3"] if c.rope_scaling == "longrope" else []  # whose models have it
    for kind in (*([original] if original in FAMILIES else first), *FAMILIES):
        family = FAMILIES[kind]
        length = {"max_position_embeddings": seq_len if kind == own_model.KIND else context}
        hf = {
            "architectures": [family.architecture],
            "model_type": kind,
            **family.write(c),
            **({"n_positions": seq_len} if kind == "gpt2" else length),
            "tie_word_embeddings": c.tie_embeddings,
        }
        try:
            _, keys = keys_of(Reader(hf, "config.json"))
        except UserError:  # Gemma without a window, for instance
            continue
        own = {key.removeprefix("model."): value for key, value in keys.items() if key.startswith("model.")}
        found = _results(dataclasses.replace(c, **own))
        yield kind, hf, {key: found.get(key) for key in wanted | found if wanted.get(key) != found.get(key)}


def _results(c: ModelConfig) -> dict[str, Any]:
    """The keys that decide what a model computes, with defaults resolved and keys that others turn off left out."""
    keys = {k: v for k, v in flatten(c).items() if k not in own_model.FREE}
    keys |= {"num_kv_heads": c.kv_heads, "head_dim": c.head_size, "d_ff": c.mlp_width}
    keys |= {"norm_eps": c.norm_eps or (1e-5 if c.norm == "layernorm" else 1e-6)}
    keys |= {"score_dim": c.score_dim or c.head_size, "qkv_bias": c.use_bias or c.qkv_bias}
    if not c.window:
        keys |= {"global_every": 0, "rope_local_theta": 0.0}
    elif not c.rope_local_theta:
        keys |= {"rope_local_theta": c.rope_theta if c.rope_scaling == "none" else 0.0}
    off = {"none": ("factor", "original", "short", "long"), "linear": ("original", "short", "long")}
    off |= {"llama3": ("short", "long"), "longrope": ()}
    for name in off[c.rope_scaling]:
        keys.pop(f"rope_{name}")
    if c.position != "rope":
        keys = {k: v for k, v in keys.items() if not k.startswith("rope_")}
    return keys


def _tensors(kind: str, c: ModelConfig, params: Params, dtype: Dtype) -> Iterator[tuple[str, np.ndarray]]:
    """All tensors, layer by layer, one at a time."""
    flat = {"/".join(k.key for k in path): x for path, x in jax.tree_util.tree_leaves_with_path(params)}
    parts: dict[str, list[tuple[str, Source]]] = {}
    for path, source in sources(kind, c, "transformer." if kind == "gpt2" else "").items():
        parts.setdefault(source.name, []).append((path, source))
    once = [name for name in parts if "{l}" not in name]
    repeated = [(layer, name) for layer in range(c.num_layers) for name in parts if "{l}" in name]
    for layer, name in [*((0, name) for name in once), *repeated]:
        found = []
        for path, source in sorted(parts[name], key=lambda part: part[1].start):
            found.append(source.given(_parameter(c, flat, path, layer)))
        axis = 0 if parts[name][0][1].transposed or found[0].ndim == 1 else 1
        whole = np.concatenate(found, axis) if len(found) > 1 else found[0]
        yield name.format(l=layer), np.ascontiguousarray(whole.astype(DTYPES[dtype]))


def _parameter(c: ModelConfig, flat: dict[str, Any], path: str, layer: int) -> np.ndarray:
    """A parameter, of one layer if it is stacked, with its LoRA added; float32."""
    found = [flat.get(name) for name in (path, path.replace("kernel", lora.A), path.replace("kernel", lora.B))]
    x, a, b = [x[layer] if x is not None and path.startswith("layers/") else x for x in found]
    is_adapted = path.endswith("kernel") and a is not None
    return lora.merged_kernel(c, x, a, b) if is_adapted else np.asarray(x, np.float32)


def special_ids(run: Run) -> Hf:
    """The ids of the tokens that open and end a text: those of the original, or else of the tokenizer."""
    original = run.folder / "tokenizer" / GENERATION
    if original.is_file():
        there = read_json(original)
        return {key: there[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if key in there}
    if run.tokenizer is None:
        return {"bos_token_id": None, "eos_token_id": None}
    ends = sorted(run.tokenizer.end_ids)
    return {"bos_token_id": run.tokenizer.bos_id, "eos_token_id": ends[0] if len(ends) == 1 else ends or None}


def _write_tokenizer(run: Run, folder: Path) -> None:
    """The tokenizer's files as they came, or those of a tokenizer that jaxlm made; for a tokenizer.json without its
    configuration, the shortest one.
    """
    own = run.folder / "tokenizer"
    special = special_ids(run)
    if not (own / GENERATION).is_file():
        (folder / GENERATION).write_text(json.dumps(special, indent=2) + "\n")
    for name in ("tokenizer.json", GENERATION, *BESIDE):
        if (own / name).is_file():
            shutil.copyfile(own / name, folder / name)
    if (own / "sentencepiece.model").is_file():
        shutil.copyfile(own / "sentencepiece.model", folder / "tokenizer.model")
    if run.tokenizer is not None and own_tokenizers.write(run.tokenizer, folder):
        return
    if (folder / "tokenizer.json").is_file() and not (folder / "tokenizer_config.json").is_file():
        ids = {"bos_token": special["bos_token_id"], "eos_token": special["eos_token_id"]}
        names = {i: name for name, i in getattr(run.tokenizer, "specials", {}).items()}
        tokens = {key: names.get(i[0] if isinstance(i, list) else i) for key, i in ids.items()}
        content = {"tokenizer_class": "PreTrainedTokenizerFast", **{k: v for k, v in tokens.items() if v}}
        (folder / "tokenizer_config.json").write_text(json.dumps(content, indent=2) + "\n")
