"""What a run trains and is judged on: token ids and what they mean."""

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxlm.config import DataConfig, UserError
from jaxlm.data.sources.files import is_alone, named
from jaxlm.data.tokenizers import Tokenizer
from jaxlm.data.tokens import Tokens


class MixtureSource(NamedTuple):
    """A source of a mixture."""

    name: str
    weight: float  # of the training samples; all shares add up to 1
    train: Tokens
    val: Tokens


@dataclasses.dataclass(frozen=True, kw_only=True)
class Corpus:
    train: Tokens
    val: Tokens
    vocab_size: int
    tokenizer: Tokenizer | None  # None: ids without a text
    bytes_per_token: np.ndarray | None  # int32 [vocab_size], UTF-8 bytes each id stands for; None: ids without a text
    fingerprint: str  # of the shards of ids: another where they are others
    folder: Path | None  # of the token store; None: no store
    facts: dict[str, Any]  # documents, bytes and tokens of each split, files and records skipped
    shares: tuple[MixtureSource, ...] = ()  # of a mixture, whose tokens are those of all sources, one after the other

    @property
    def parts(self) -> tuple[MixtureSource, ...]:
        """Its sources: the shares of a mixture, else one without a name."""
        return self.shares or (MixtureSource("", 1.0, self.train, self.val),)


def fingerprint(vocab_size: int, *digests: Any) -> str:
    """A short name of ids."""
    return hashlib.sha256(json.dumps([vocab_size, *digests]).encode()).hexdigest()[:16]


def check_lengths(data: DataConfig, seq_len: int, num_train: int, num_val: int) -> None:
    """Raises UserError where a source is too short for one training sequence or one validation target."""
    where = named(data)
    if num_train < seq_len + 1 and not is_alone(data):
        raise UserError(f"{where}: {num_train} training tokens; allowed: at least seq_len + 1 = {seq_len + 1}")
    if num_val < 2:
        raise UserError(f"{where}: {num_val} validation tokens; allowed: at least 2 (see data.val_fraction)")
