"""Checks every value of a configuration and how the values fit together, before any device is touched."""

import math
import re
from typing import Any, Literal, get_args, get_origin

from jaxlm.config import (
    MAX_FLOAT,
    MAX_INT,
    MIN_FLOAT,
    SOURCES,
    Config,
    DataConfig,
    ModelConfig,
    UserError,
    describe,
    flatten,
    key_types,
    mixture,
    show,
)
from jaxlm.config.own_values import PEAKS, set_own_values
from jaxlm.config.validate_parallel import Require, check_parallel

POSITIVE = (
    "steps",
    "batch_size",
    "seq_len",
    "model.num_layers",
    "model.d_model",
    "model.num_heads",
    "model.rope_theta",
    "model.vocab_multiple",
    "optim.accum_steps",
    "optim.lr",
    "optim.eps",
    "optim.max_skipped",
    "parallel.tensor",
    "parallel.context",
    "parallel.pipeline",
    "parallel.chunks",
    "log.every_steps",
    "checkpoint.keep",
)
SECRET_NAMES = re.compile("token|secret|passw|signature|credential|(api|access).?key|^(key|sig|auth)$")
LEAST = {"model.scan_unroll": -1}  # 0 for all others
# Larger values are slips of the keyboard. They would exhaust the memory, or overflow XLA's numbers.
LARGEST = {
    "model.num_layers": 10_000,
    "model.encoder_layers": 10_000,
    "model.encoder_len": 2**20,
    "model.d_model": 2**20,
    "model.d_ff": 2**22,
    "model.vocab_multiple": 2**20,
}
MAX_SEED = 2**32 - 2  # JAX takes 32 bits, and the seed of dropout is seed + 1
BELOW_ONE = (
    "model.dropout",
    "model.lora_dropout",
    "loss.label_smoothing",
    "optim.b1",
    "optim.b2",
    "optim.momentum",
    "optim.ema_decay",
)


def _check_type(key: str, value: Any, kind: Any) -> None:
    if get_origin(kind) is Literal:
        fits = value in get_args(kind)
    elif kind is float:
        fits = type(value) is int or (isinstance(value, float) and math.isfinite(value))
    else:
        fits = type(value) is kind
    if not fits:
        raise UserError(f"{key} is {show(value)}; allowed: {describe(kind)}")


def check_address(key: str, text: str) -> None:
    """Raises UserError if an address in the text holds a secret. The message does not repeat the text."""
    if _holds_secret(text):
        raise UserError(
            f"{key} has an address with credentials in it, which a run would write into its config.json; "
            "allowed: an address without them; credentials come from the environment"
        )


def _holds_secret(text: str) -> bool:
    """Whether an address in the text has a user:password@, any user@ for http(s), or a secret in its query.

    Addresses for fsspec's Git file systems may have owner:repository@, which is no secret.
    """
    scheme, *addresses = text.lower().split("://")
    for address in addresses:
        host = re.split(r"[/?#;\s]", address, maxsplit=1)[0]  # cuts a password with a slash, as Amazon's may have
        pair = ":" in host.partition("@")[0] and not re.fullmatch(r"[^:]*:\d+", host)  # but not HOST:PORT
        if pair and "@" in address and not scheme.endswith(("git", "github")):
            return True
        if "@" in host and scheme.endswith(("http", "https")):
            return True
        if any(map(SECRET_NAMES.search, re.findall("(?:^|&)([^=&]*)=", address.partition("?")[2]))):
            return True
        scheme = address
    return False


def validate(c: Config) -> Config:
    """Replaces OWN by the optimizer's own values, and `auto` where another key decides, in place; then checks every
    value and how the values fit together.

    Returns:
      The same configuration.

    Raises:
      UserError: names the key, the value found and what is allowed.
    """
    set_own_values(c.optim)
    if c.parallel.zero == 3 and c.model.remat == "auto":
        c.model.remat = "elementwise"
    _check_values(flatten(c))

    def require(ok: bool, key: str, allowed: str) -> None:
        if not ok:
            raise UserError(f"{key} is {show(flatten(c)[key])}; allowed: {allowed}")

    _check_model(c.model, require)
    _check_steps(c, require)
    check_parallel(c, require)
    if c.model.encoder_layers:
        _check_encoder(c, require)
    _check_data(c.data, require)
    resume = "auto, never, or a workdir, after which @STEP or @best may follow"
    require(c.checkpoint.resume != "", "checkpoint.resume", resume)
    return c


def _check_values(values: dict[str, Any]) -> None:
    """Checks the type and the range of each value."""
    types = key_types()
    for key, value in values.items():
        _check_type(key, value, types[key])
        if types[key] is str:
            check_address(key, value)

    def require(ok: bool, key: str, allowed: str) -> None:
        if not ok:
            raise UserError(f"{key} is {show(values[key])}; allowed: {allowed}")

    for key in POSITIVE:
        require(values[key] > 0, key, "more than 0")
    for key, value in values.items():
        if types[key] in (int, float):
            least = LEAST.get(key, 0)
            require(value >= least, key, f"{least} or more")
        if types[key] is int:
            limit = MAX_SEED if key == "seed" else MAX_INT
            require(value <= limit, key, f"at most {limit}")
        if types[key] is float:
            require(value == 0 or MIN_FLOAT <= value <= MAX_FLOAT, key, f"0, or {MIN_FLOAT} to {MAX_FLOAT}")
    for key, largest in LARGEST.items():
        require(values[key] <= largest, key, f"at most {largest}")
    for key in BELOW_ONE:
        require(values[key] < 1, key, "at least 0 and less than 1")
    for key in ("optim.min_lr_ratio", "optim.decay_fraction"):
        require(values[key] <= 1, key, "0 to 1")


def _check_model(m: ModelConfig, require: Require) -> None:
    if not m.head_dim:
        allowed = f"a divisor of model.d_model = {m.d_model}, or any number with a model.head_dim"
        require(m.d_model % m.num_heads == 0, "model.num_heads", allowed)
    require(m.num_heads % m.kv_heads == 0, "model.num_kv_heads", f"a divisor of model.num_heads = {m.num_heads}")
    of_size = "model.head_dim" if m.head_dim else "model.num_heads"
    size = f"one that leaves {{}} of d_model = {m.d_model}" if not m.head_dim else "{}"
    even = m.head_size % 2 == 0
    if m.position == "rope":
        require(even, of_size, f"with position=rope, {size.format('an even head size')}")
        _check_rope(m, require)
    if m.position == "sinusoidal":
        require(m.d_model % 2 == 0, "model.d_model", "with position=sinusoidal, an even number")
    if m.key_offset:
        require(even and m.head_size >= 4, of_size, f"with key_offset, {size.format('an even head size of 4 or more')}")
    if m.attention in ("cudnn", "triton"):
        require(m.dtype != "float32", "model.dtype", f"with attention={m.attention}, bfloat16 or float16")
        fits = m.head_size % 8 == 0 and m.head_size <= 128
        require(fits, of_size, f"with attention={m.attention}, one that gives a head size of 8, 16, ... 128")
        require(not m.attention_softcap, "model.attention", "with attention_softcap, auto or xla")
        require(not m.window or m.attention != "triton", "model.attention", "with a window, auto, xla or cudnn")
    if m.lora_rank:
        _check_lora(m, require)
    if m.global_every or m.rope_local_theta:
        require(m.window > 0, "model.window", "with global_every or rope_local_theta, more than 0")


def _check_encoder(c: Config, require: Require) -> None:
    """What other keys must be with an encoder."""
    m, d = c.model, c.data
    require(m.encoder_len > 1, "model.encoder_len", "with model.encoder_layers, at least 2: bos and a token")
    require(d.packing == "document", "data.packing", "with model.encoder_layers, document: pairs are kept apart")
    require(not m.window, "model.window", "with model.encoder_layers, 0")
    require(m.rope_scaling != "longrope", "model.rope_scaling", "with model.encoder_layers, none, linear, llama3")
    allowed = "with model.encoder_layers, none; data.prompt_key and data.response_key name the pairs"
    require(not d.messages_key, "data.messages_key", allowed)
    pairs = [name for name, kind in SOURCES.items() if kind.records or (kind.files and kind.ids)]
    allowed = f"with model.encoder_layers, which reads pairs: {', '.join(pairs)}"
    for part in [part for _, part in mixture(d)] if d.mixture else [d]:
        kind = SOURCES[part.source]
        require(part.source in pairs, "data.mixture" if d.mixture else "data.source", allowed)
        for key in ("prompt_key", "response_key") if kind.records else ():
            require(bool(getattr(part, key)), f"data.{key}", "a key, with model.encoder_layers, which reads pairs")


def _check_lora(m: ModelConfig, require: Require) -> None:
    most = min(m.d_model, m.mlp_width)
    require(m.lora_rank <= most, "model.lora_rank", f"at most {most}, the smaller of d_model and d_ff")
    require(m.lora_alpha > 0, "model.lora_alpha", "more than 0")
    layers = ", ".join(m.linear_layers)
    fits = _is_pattern(m.lora_targets) and any(map(m.has_lora, m.linear_layers))
    require(fits, "model.lora_targets", f"a regular expression of one or more of {layers}")


def _is_pattern(text: str) -> bool:
    try:
        re.compile(text)
    except re.error:
        return False
    return True


def _check_rope(m: ModelConfig, require: Require) -> None:
    fits = 0 < m.rope_fraction <= 1 and m.rotated > 0 and m.rotated % 2 == 0
    require(fits, "model.rope_fraction", f"0 to 1, and an even part of a head's {m.head_size} channels")
    if m.rope_scaling == "none":
        return
    require(m.rope_factor >= 1, "model.rope_factor", "1 or more")
    if m.rope_scaling != "linear":
        require(m.rope_original > 1, "model.rope_original", f"with rope_scaling={m.rope_scaling}, more than 1")
    if m.rope_scaling == "longrope":
        pairs = m.rotated // 2
        for key, text in (("model.rope_short", m.rope_short), ("model.rope_long", m.rope_long)):
            try:
                numbers = [float(n) for n in text.split()]
            except ValueError:
                numbers = []
            good = len(numbers) == pairs and all(0 < n < math.inf for n in numbers)
            require(good, key, f"with rope_scaling=longrope, {pairs} numbers of more than 0, with spaces between")


def _check_steps(c: Config, require: Require) -> None:
    o = c.optim
    require(c.batch_size % o.accum_steps == 0, "batch_size", f"a multiple of optim.accum_steps = {o.accum_steps}")
    if "adam_lr" in PEAKS[o.name]:
        require(o.adam_lr > 0, "optim.adam_lr", f"more than 0 with optim.name={o.name}")
    require(_is_pattern(o.freeze), "optim.freeze", "a regular expression of names of parameters")
    require(not 0 < o.spike_factor <= 1, "optim.spike_factor", "0, or more than 1")
    require(0 < o.return_lr <= 1, "optim.return_lr", "more than 0, at most 1")
    require(o.warmup_steps <= c.steps, "optim.warmup_steps", f"at most steps = {c.steps}")
    require(c.log.profile_steps <= c.steps, "log.profile_steps", f"at most steps = {c.steps}")


def _check_data(d: DataConfig, require: Require) -> None:
    parts = [part for _, part in mixture(d)] if d.mixture else [d]
    _check_paths(d, parts, require)
    _check_conversations(d, parts, require)
    for part in parts:
        _check_source(part, require)
    if d.tokenizer == "hf":
        allowed = "a Hugging Face tokenizer.json or a folder with one; data.tokenizer=hf needs it"
        require(bool(d.tokenizer_path), "data.tokenizer_path", allowed)
    ids = any(SOURCES[part.source].ids for part in parts)
    if (d.tokenizer == "sentencepiece" and not d.tokenizer_path) or ids:
        floor = 2 if ids else 300  # sentencepiece: 256 bytes, special tokens and some trained pieces
        require(d.vocab_size >= floor, "data.vocab_size", f"at least {floor}")


def _check_paths(d: DataConfig, parts: list[DataConfig], require: Require) -> None:
    if d.mixture:
        require(not d.val_path, "data.val_path", "none with data.mixture, which holds out val_fraction of its sources")
        data_dir = any(SOURCES[part.source].splits for part in parts)
        require(not d.path or data_dir, "data.path", "none with data.mixture, which names the paths of its sources")
        return
    with_val_path = [name for name, kind in SOURCES.items() if kind.files]
    with_path = with_val_path + [name for name, kind in SOURCES.items() if kind.splits]
    for key, path, sources in (("val_path", d.val_path, with_val_path), ("path", d.path, with_path)):
        allowed = f"none with data.source={d.source}; {', '.join(sources)} have one"
        require(not path or d.source in sources, f"data.{key}", allowed)


def _check_conversations(d: DataConfig, parts: list[DataConfig], require: Require) -> None:
    if d.prompt_key or d.response_key:
        require(not d.messages_key, "data.messages_key", "none beside prompt_key and response_key")
        require(bool(d.response_key), "data.response_key", "a key, since data.prompt_key is set")
    if d.messages_key or (d.response_key and d.chat_template):
        fits = d.chat_template.count("{content}") == 1 and "{role}" in d.chat_template
        allowed = "a text with {role}, and with {content} once; Jinja; or tokenizer, for the one that came with it"
        require(fits or d.jinja, "data.chat_template", allowed)
    # A shell passes '...\\n' as a backslash and an n, which the model would learn to write.
    allowed = r"newlines instead of a backslash and an n; in a shell --config.data.chat_template=$'...\n'"
    require("\\n" not in d.chat_template or d.jinja, "data.chat_template", allowed)
    if not any(SOURCES[part.source].records for part in parts):
        have_keys = ", ".join(name for name, kind in SOURCES.items() if kind.records)
        here = "this data.mixture" if d.mixture else f"data.source={d.source}"
        for key in ("response_key", "messages_key"):
            require(not getattr(d, key), f"data.{key}", f"none with {here}; {have_keys} have keys")


def _check_source(d: DataConfig, require: Require) -> None:
    """Checks one source: the data itself, or a part of a mixture."""
    kind = SOURCES[d.source]
    if kind.records:
        has_key = bool(d.text_key or d.response_key or d.messages_key)
        require(has_key, "data.text_key", "the key of a record's text")
    if kind.files:
        require(bool(d.path), "data.path", f"a path; data.source={d.source} needs one")
    if kind.splits:
        require(bool(d.tfds_name), "data.tfds_name", "the name of a builder; data.source=tfds needs one")
        require(bool(d.split), "data.split", "the name of a split")
    if not (d.val_path if kind.files else d.val_split if kind.splits else ""):
        allowed = "more than 0 and less than 1 when no validation data is named"
        require(0 < d.val_fraction < 1, "data.val_fraction", allowed)
