"""Makes a workdir of a Hugging Face model: its parameters as the checkpoint of step 0, its tokenizer, its keys."""

import json
import math
import re
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxlm import data
from jaxlm.checkpoint import workdirs
from jaxlm.checkpoint.reading import host, shapes
from jaxlm.checkpoint.writing import write_params
from jaxlm.config import Config, UserError, files, show
from jaxlm.config.pretrained import updated
from jaxlm.config.validate import validate
from jaxlm.data.order import VERSION
from jaxlm.data.tokenizers.hf import HfTokenizer
from jaxlm.interop.config_json import Hf, Reader
from jaxlm.interop.families import keys_of
from jaxlm.interop.folder import check_new, whole_folder
from jaxlm.interop.shards import Tensors
from jaxlm.interop.tensors import DTYPES, Dtype, Source, Sources, sources
from jaxlm.model import Params, make_model

MODEL_TYPE = "hf_model_type"  # in config.json: the family that the workdir was imported from
GENERATION = "generation_config.json"  # kept beside the tokenizer: exports give it back
# Tensors that older files have, and that are no parameters.
UNUSED = r".*rotary_emb\.inv_freq|.*attn\.(masked_)?bias"


class Imported(NamedTuple):
    config: Config
    vocab_size: int
    parameters: int


def import_model(source: Path, workdir: Path, seq_len: int | None = None, dtype: Dtype = "float32") -> Imported:
    """Writes the workdir whole or not at all.

    Args:
      source: a folder with config.json, safetensors and, if texts are to be read, a tokenizer.
      seq_len: the context, if it shall be shorter than the model's.
      dtype: of the parameters; bfloat16 takes half the memory, and rounds float32 tensors and 1 + w of Gemma's norms.

    Raises:
      UserError: jaxlm cannot do what the model does, or a file is missing, damaged or of another model.
    """
    check_new("WORKDIR", workdir)
    hf = read_json(source / "config.json")
    reader = Reader(hf, str(source / "config.json"))
    _, keys = keys_of(reader)
    tokenizer = _tokenizer(source)
    tensors = Tensors(source)
    rows, kind = reader.number("vocab_size"), hf["model_type"]
    vocab_size = tokenizer.vocab_size if tokenizer else rows
    if vocab_size > rows:
        raise UserError(f"{reader.name}: vocab_size is {rows}; allowed: at least {vocab_size}, as the tokenizer has")
    config = _config(keys, seq_len, vocab_size, rows)
    config.model.param_dtype = dtype
    if tokenizer is None:
        config.data.source = "synthetic"
    else:
        config.data.tokenizer = "hf" if isinstance(tokenizer, HfTokenizer) else "sentencepiece"
        config.data.tokenizer_path = str(workdir.absolute() / "tokenizer")
    validate(config)
    prefix = "transformer." if any(name.startswith("transformer.") for name in tensors.names) else ""
    found = sources(kind, config.model, prefix)
    model = make_model(config.model, vocab_size, config.seq_len)
    wanted = shapes(model.shapes())
    assert wanted.keys() == found.keys(), wanted.keys() ^ found.keys()
    _check(tensors, source, found, wanted, config.model.tie_embeddings)
    params = read_params(tensors, found, wanted, DTYPES[dtype])
    facts = {"data_fingerprint": "imported", "vocab_size": vocab_size, "order": VERSION, MODEL_TYPE: kind}
    _write(workdir, source, config, facts, tokenizer, params)
    return Imported(config, vocab_size, sum(x.size for x in jax.tree.leaves(params)))


def read_json(path: Path) -> Hf:
    """Raises UserError unless the file holds a JSON object."""
    try:
        content = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{path}: unreadable ({reason}); allowed: a Hugging Face model's folder") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds {show(content)}; allowed: an object of keys")
    return content


def _tokenizer(source: Path) -> data.Tokenizer | None:
    for name in ("tokenizer.json", "tokenizer.model"):
        if (source / name).is_file():
            return data.load_tokenizer(source / name)
    return None


def _config(keys: dict[str, Any], seq_len: int | None, vocab_size: int, rows: int) -> Config:
    """The configuration of configs/base.py with the model's keys.

    Args:
      rows: of the token table; those from `vocab_size` on have no token.
    """
    context = keys["seq_len"]
    if seq_len is not None and not 0 < seq_len <= context:
        raise UserError(f"--seq_len is {seq_len}; allowed: 1 to {context}, the context of the model")
    if seq_len is not None and keys["model.position"] == "learned" and seq_len != context:
        raise UserError(f"--seq_len is {seq_len}; allowed: {context}, for which the model has learned positions")
    keys = keys | {"seq_len": seq_len or context, "data.vocab_size": vocab_size}
    keys["model.vocab_multiple"] = 1 if vocab_size == rows else rows
    return updated(files.load(files.BASE), keys)


def _check(tensors: Tensors, source: Path, found: Sources, wanted: dict[str, tuple[int, ...]], tied: bool) -> None:
    """Raises UserError unless the files hold the model's tensors, in their shapes, and no others."""
    shape_of: dict[str, tuple[int, ...]] = {}
    for path, s in found.items():
        stacked = path.startswith("layers/")
        for layer in range(wanted[path][0] if stacked else 1):
            name = s.name.format(l=layer)
            shape = _shape(s, wanted[path][1:] if stacked else wanted[path], shape_of.get(name))
            shape_of[name] = shape
    missing = sorted(shape_of.keys() - tensors.names)
    unused = UNUSED + (r"|lm_head\.weight" if tied else "")
    extra = sorted(name for name in tensors.names - shape_of.keys() if not re.fullmatch(unused, name))
    for names, what in ((missing, "lacks"), (extra, "has")):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise UserError(f"{source}: {what} the tensor {names[0]}{more}; allowed: those of its config.json")
    for name, shape in shape_of.items():
        if tensors.shape(name) != shape:
            raise UserError(f"{source}: {name} is {tensors.shape(name)}; allowed: {shape}, by its config.json")


def _shape(s: Source, parameter: tuple[int, ...], so_far: tuple[int, ...] | None) -> tuple[int, ...]:
    """The shape of a tensor; one with several parts ends with the last of them."""
    shape = list(parameter[::-1] if s.transposed else parameter)
    if s.stop:
        axis = 0 if s.transposed or len(shape) == 1 else 1
        shape[axis] = max(s.stop, so_far[axis] if so_far else 0)
    return tuple(shape)


def read_params(tensors: Tensors, found: Sources, wanted: dict[str, tuple[int, ...]], dtype: Any) -> Params:
    """The parameters on the host, read one tensor at a time. Orbax would copy NumPy arrays."""
    params: dict[str, Any] = {}
    for path, s in found.items():
        *above, last = path.split("/")
        holder = params
        for key in above:
            holder = holder.setdefault(key, {})
        x = _aligned(wanted[path], np.dtype(dtype))
        if path.startswith("layers/"):
            for layer in range(len(x)):
                x[layer] = s.taken(tensors.read(s.name.format(l=layer)))
        else:
            x[:] = s.taken(tensors.read(s.name))
        holder[last] = jax.device_put(x, host())
    return params


def _aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An empty array at an address that JAX takes without copying the array."""
    size = dtype.itemsize * math.prod(shape)
    buffer = np.empty(size + 64, np.uint8)
    start = -buffer.ctypes.data % 64
    return buffer[start : start + size].view(dtype).reshape(shape)


def _write(
    workdir: Path, source: Path, config: Config, facts: Hf, tokenizer: data.Tokenizer | None, params: Params
) -> None:
    """Writes to a folder beside the workdir, which gets the workdir's name when it is whole."""
    with whole_folder("WORKDIR", workdir) as temporary, workdirs.Lock() as lock:
        workdirs.claim(temporary, config, facts, None, lock)
        workdirs.save_tokenizer(temporary, tokenizer)
        if tokenizer is not None and (source / GENERATION).is_file():
            shutil.copyfile(source / GENERATION, temporary / "tokenizer" / GENERATION)
        write_params(temporary, params)
