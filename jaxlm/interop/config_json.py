"""Reads a Hugging Face model's config.json; and what a family of models is."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

from jaxlm.config import ModelConfig, UserError, show

Hf = dict[str, Any]  # the content of a config.json
# Keys of the model with the values that they have where a family does not read them.
UNREAD: dict[str, Any] = {
    "model.num_kv_heads": 0,
    "model.head_dim": 0,
    "model.post_norms": False,
    "model.rope_theta": 10_000.0,
    "model.rope_fraction": 1.0,
    "model.rope_scaling": "none",
    "model.window": 0,
    "model.global_every": 0,
    "model.rope_local_theta": 0.0,
    "model.score_dim": 0,
    "model.attention_softcap": 0.0,
    "model.use_bias": False,
    "model.qkv_bias": False,
    "model.scale_embeddings": False,
    "model.dropout": 0.0,
    "model.logit_softcap": 0.0,
    "model.qk_norm": False,
    "model.key_offset": False,
}


class Family(NamedTuple):
    architecture: str  # the class of `transformers`
    tied: bool  # whether embeddings are tied where config.json does not say it
    read: Callable[["Reader"], dict[str, Any]]  # config.json -> keys of the model
    write: Callable[[ModelConfig], Hf]  # what `read` reads, apart from sizes


class Reader:
    """A config.json, with errors that name it."""

    def __init__(self, hf: Hf, name: str):
        self._hf, self.name = hf, name

    def get(self, key: str, default: Any = None) -> Any:
        """The value, or `default` if the key is absent or null."""
        value = self._hf.get(key)
        return default if value is None else value

    def number(self, key: str) -> Any:
        """Raises UserError unless the key has a number of more than 0."""
        value: Any = self._hf.get(key)
        if type(value) not in (int, float) or not 0 < value < math.inf:
            raise UserError(f"{self.name}: {key} is {show(value)}; allowed: a number of more than 0")
        return value

    def require(self, key: str, default: Any, *allowed: Any) -> Any:
        """The value. Raises UserError unless it is one of those allowed."""
        value = self.get(key, default)
        if value not in allowed:
            raise UserError(f"{self.name}: {key} is {show(value)}; allowed: {', '.join(map(repr, allowed))}")
        return value

    def table(self, key: str) -> Hf:
        """The object at a key, {} if there is none. Raises UserError if it is none."""
        value = self.get(key, {})
        if not isinstance(value, dict):
            raise UserError(f"{self.name}: {key} is {show(value)}; allowed: an object of keys")
        return value

    def rope(self, kind: str = "full_attention", **defaults: Any) -> "Reader":
        """RoPE's keys: transformers 5 has them in rope_parameters, by kind of layer if these differ; 4 in
        rope_scaling, apart from the base.
        """
        own = Reader(self.table("rope_parameters"), self.name)
        scaling = own.table(kind) or self.table("rope_parameters") or self.table("rope_scaling")
        return Reader({"rope_theta": self.get("rope_theta", 10_000.0), **defaults, **scaling}, f"{self.name}: RoPE")
