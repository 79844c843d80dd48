"""What a run trains and is judged on: two arrays of token ids and what they mean."""

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np

from jaxlm.config import UserError
from jaxlm.data.tokenizers import Tokenizer


@dataclasses.dataclass(frozen=True, kw_only=True)
class Corpus:
    train: np.ndarray  # unsigned ids [num_tokens], memory-mapped where they come from a file
    val: np.ndarray
    vocab_size: int
    tokenizer: Tokenizer | None  # None: ids without a text
    bytes_per_token: np.ndarray | None  # int32 [vocab_size], UTF-8 bytes each id stands for
    fingerprint: str  # of the ids themselves: equal where two corpora are, whatever files they come from
    folder: Path | None  # of the token store; None: no store
    facts: dict[str, Any]  # documents, bytes and tokens of each split, files skipped


def fingerprint(vocab_size: int, train_sha256: str, val_sha256: str) -> str:
    """A short name of the ids of both splits."""
    return hashlib.sha256(json.dumps([vocab_size, train_sha256, val_sha256]).encode()).hexdigest()[:16]


def check_lengths(where: str, num_train: int, num_val: int, seq_len: int) -> None:
    """Raises UserError where the corpus is too short for one training sequence or one validation target."""
    if num_train < seq_len + 1:
        raise UserError(f"{where}: {num_train} training tokens; allowed: at least seq_len + 1 = {seq_len + 1}")
    if num_val < 2:
        raise UserError(f"{where}: {num_val} validation tokens; allowed: at least 2 (see data.val_fraction)")
