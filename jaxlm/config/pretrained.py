"""A run that starts from another run's weights (`checkpoint.resume`): it takes that run's model keys and tokenizer.

Nothing here imports jax.
"""

import copy
import json
import re
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

from jaxlm.config import SOURCES, Config, UserError, flatten, key_types, show
from jaxlm.config.paths import user_path

Step = int | Literal["best"] | None  # a checkpoint's step; best = the lowest validation loss; None = the newest

# Keys of a model that do not change what its weights compute, except for rounding. LoRA is added to the weights before
# another run takes them.
FREE = r"model\.(dtype|param_dtype|dropout|remat|attention|matmul_precision|scan_unroll|residual_init|lora_.*)"


class Weights(NamedTuple):
    workdir: Path
    step: Step


def named_weights(resume: str) -> Weights | None:
    """The weights that `checkpoint.resume` names: WORKDIR, WORKDIR@STEP or WORKDIR@best. None for auto and never."""
    if resume in ("auto", "never", ""):  # `validate` refuses the empty string
        return None
    path = user_path("checkpoint.resume", resume)
    workdir, _, step = resume.rpartition("@")
    if workdir and re.fullmatch(r"\d+|best", step) and not path.exists():
        return Weights(user_path("checkpoint.resume", workdir), read_step("checkpoint.resume", step))
    return Weights(path, None)


def read_step(name: str, text: str | None) -> Step:
    """The step that `text`, the value of the option `name`, means. Raises UserError if it means none."""
    if text is None or text == "best":
        return text
    if not re.fullmatch(r"\d{1,18}", text):
        raise UserError(f"{name} is {text!r}; allowed: the step of a checkpoint, or best")
    return int(text)


def keys_of(config: Config) -> dict[str, Any]:
    """The keys of a run that determine what its weights compute, and from which token ids."""
    flat = flatten(config)
    keys = {k: v for k, v in flat.items() if k.startswith("model.") and not re.fullmatch(FREE, k)}
    if config.model.position == "learned":  # the table has a row for each position
        keys["seq_len"] = config.seq_len
    return keys | {k: flat[k] for k in ("data.tokenizer", "data.tokenizer_path", "data.vocab_size")}


def brought_by(workdir: Path, config: Config, vocab_size: int) -> dict[str, Any]:
    """The keys, with their values, that the weights in a workdir bring to another run.

    Args:
      workdir, config, vocab_size: of the run that trained the weights.
    """
    keys = {k: v for k, v in keys_of(config).items() if not k.startswith("data.")} | {"data.vocab_size": vocab_size}
    folder = workdir / "tokenizer"
    if not folder.is_dir():
        return keys
    return keys | {"data.tokenizer": _kind(folder), "data.tokenizer_path": str(folder)}


def _kind(folder: Path) -> str:
    for name in ("jaxlm_tokenizer.json", "tokenizer.json"):  # older runs have only the second
        try:
            kind = json.loads((folder / name).read_text("utf-8"))["kind"]
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            continue
        if kind not in (kinds := get_args(key_types()["data.tokenizer"])):
            raise UserError(f"{folder / name}: kind is {show(kind)}; allowed: {', '.join(kinds)}")
        return kind
    raise UserError(f"{folder}: not the tokenizer of a run; allowed: the folder as a run wrote it")


def updated(config: Config, keys: dict[str, Any]) -> Config:
    """A copy of the configuration with new values of `keys`."""
    config = copy.deepcopy(config)
    for key, value in keys.items():
        *sections, name = key.split(".")
        holder: Any = config
        for section in sections:
            holder = getattr(holder, section)
        setattr(holder, name, value)
    return config


def check_asked(config: Config, brought: dict[str, Any], asked: set[str], run: Config, workdir: Path) -> None:
    """Raises UserError if a key that the user set contradicts the weights, or if the data is text but the weights come
    without a tokenizer.

    Args:
      brought: the keys that the weights bring, from `brought_by`.
      asked: the names of the keys that the user set.
      run: the configuration of the run in `workdir`, which trained the weights.
    """
    found = flatten(config)
    free = {"data.tokenizer_path"}  # start_from.py compares the tokenizers' files
    if run.model.position != "learned":
        free.add("model.encoder_len")
    for key in sorted(asked & brought.keys() - free):
        if found[key] not in (brought[key], flatten(run)[key]):
            raise UserError(
                f"{key} is {found[key]!r}; allowed: {brought[key]!r}, as in {workdir}, whose weights "
                "checkpoint.resume takes"
            )
    d = config.data
    bare = SOURCES[d.source].ids and not d.mixture
    if "data.tokenizer_path" not in brought and not d.tokenizer_path and not bare:
        raise UserError(
            f"data.source is {d.source!r}; allowed: tokens, synthetic, or a data.tokenizer_path, since "
            f"{workdir}, whose weights checkpoint.resume takes, has no tokenizer"
        )


def with_own_tokenizer(config: Config, workdir: Path) -> Config:
    """The configuration, with the run's own copy of the tokenizer if the one that the configuration names is gone."""
    path, own = config.data.tokenizer_path, workdir / "tokenizer"
    if not path or not own.is_dir() or user_path("data.tokenizer_path", path).exists():
        return config
    return updated(config, {"data.tokenizer_path": str(own)})
