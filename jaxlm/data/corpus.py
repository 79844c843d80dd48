"""The tokens that a run trains on and is evaluated on, and what their ids mean."""

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
    weight: float  # its share of the training samples; all weights add up to 1
    train: Tokens
    val: Tokens


@dataclasses.dataclass(frozen=True, kw_only=True)
class Corpus:
    train: Tokens
    val: Tokens
    vocab_size: int
    tokenizer: Tokenizer | None  # None if the ids stand for no known text
    bytes_per_token: np.ndarray | None  # int32 [vocab_size], UTF-8 bytes of text behind each id; None without tokenizer
    fingerprint: str  # hash of the token shards; differs if their contents differ
    folder: Path | None  # folder of the token store; None without a store
    facts: dict[str, Any]  # documents, bytes and tokens of each split; number of files and records skipped
    shares: tuple[MixtureSource, ...] = ()  # sources of a mixture; train and val then concatenate their tokens

    @property
    def parts(self) -> tuple[MixtureSource, ...]:
        """The sources of a mixture; without a mixture, the whole corpus as one source named ""."""
        return self.shares or (MixtureSource("", 1.0, self.train, self.val),)


def fingerprint(vocab_size: int, *digests: Any) -> str:
    """Returns a short hash that identifies token ids by their vocabulary size and the digests of their shards."""
    return hashlib.sha256(json.dumps([vocab_size, *digests]).encode()).hexdigest()[:16]


def check_lengths(data: DataConfig, seq_len: int, num_train: int, num_val: int) -> None:
    """Raises UserError if a source is too short for one training sequence or one validation target."""
    where = named(data)
    if num_train < seq_len + 1 and not is_alone(data):
        raise UserError(f"{where}: {num_train} training tokens; allowed: at least seq_len + 1 = {seq_len + 1}")
    if num_val < 2:
        raise UserError(f"{where}: {num_val} validation tokens; allowed: at least 2 (see data.val_fraction)")
