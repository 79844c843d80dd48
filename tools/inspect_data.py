"""Shows what the model sees: decoded batches, what is learned of them, and what the corpus is made of.

    python tools/inspect_data.py --config configs/base.py [--step 100] [--rows 2] [--split val] [-o data.svg]

The last line on stdout is one JSON object.
"""

import argparse
import io
import itertools
import json
import os
import sys
from pathlib import Path
from typing import NamedTuple
from xml.sax.saxutils import escape

import numpy as np
from rich.cells import cell_len
from rich.console import Console
from rich.text import Text

from jaxlm import cli
from jaxlm.config import Config, UserError, show
from jaxlm.console import human
from jaxlm.data import Corpus, Tokenizer, prepare
from jaxlm.data.inspect import (
    PADDING_EDGES,
    Batch,
    Piece,
    View,
    documents,
    learned_share,
    mixture_shares,
    token_counts,
)
from jaxlm.main import exit_code

SPLITS = ("train", "val")
TOP = 20  # most frequent tokens that are shown
MARKS = "⟨⟩‹›"
READ, MARK = "dim", "bold cyan"  # styles of what is only read, and of what is no text
WIDTH, LINE = 960, 18  # of the picture, in pixels
MAP_ROWS = 32  # of a batch in the picture, at most
COLORS = ("#4477aa", "#228833", "#aa3377", "#ee6677", "#ccbb44", "#66ccee")  # Tol's, for colour-blind eyes too


class Bar(NamedTuple):
    label: str
    share: float  # 0 to 1
    text: str  # the number, for people


class Chart(NamedTuple):
    title: str
    bars: list[Bar]


# Text


def visible(data: bytes, lines: bool = True) -> str:
    """Bytes as text that moves no cursor: what is no UTF-8, cannot be printed, or is a mark is written \\x1b, \\u27e8.

    `lines` keeps newlines and tabs.
    """
    kept = "\n\t" if lines else ""
    text = data.decode("utf-8", "backslashreplace")
    fine = (c if c in kept or (c.isprintable() and c not in MARKS) else c.encode("unicode_escape").decode() for c in text)
    return "".join(fine)


def decoded(ids: list[int], tokenizer: Tokenizer | None, lines: bool = True) -> list[tuple[str, bool]]:
    """What ids stand for, and whether that is text; ids that stand for no text are marks."""
    if tokenizer is None:
        return [(" ".join(map(str, ids)) + " ", True)]
    found = []
    for is_text, group in itertools.groupby(ids, lambda i: bool(tokenizer.pieces[i])):
        if is_text:
            found.append((visible(b"".join(tokenizer.pieces[i] for i in group), lines), True))
        else:
            found += [("⟨bos⟩" if i == tokenizer.bos_id else f"⟨id {i}⟩", False) for i in group]
    return found


def row_text(batch: Batch, row: int, tokenizer: Tokenizer | None, plain: bool) -> Text:
    """A row, each document on a line of its own."""
    out = Text()
    for piece in batch.pieces(row):
        if out and not out.plain.endswith("\n"):
            out.append("\n")
        ids, learned = piece.ids.tolist(), piece.learned.tolist()
        size = f"{piece.length} token{'s' * (piece.length != 1)}"
        if piece.opens is False:
            out.append(f"⟨goes on · {size}⟩", MARK)
        for is_learned, group in itertools.groupby(range(len(ids)), learned.__getitem__):
            places = list(group)
            parts = decoded([ids[i] for i in places], tokenizer)
            if piece.opens and places[0] == 0:
                parts[0] = (f"⟨bos · {size}⟩", False)
            _append(out, parts, is_learned, plain)
    padding = batch.rows["inputs"].shape[1] - int(batch.filled[row])
    if padding:
        out.append("\n" * bool(out)).append(f"⟨padding · {padding} places⟩", f"{MARK} {READ}")
    return out


def _append(out: Text, parts: list[tuple[str, bool]], learned: bool, plain: bool) -> None:
    """Adds text and marks; where there are no styles, what is not learned stands between ‹ and ›."""
    out.append("‹" * (plain and not learned))
    for text, is_text in parts:
        out.append(text, " ".join([MARK] * (not is_text) + [READ] * (not learned)))
    out.append("›" * (plain and not learned))


def print_batch(console: Console, batch: Batch, args: argparse.Namespace, corpus: Corpus, plain: bool) -> None:
    read = Text("‹not learned›" if plain else "not learned", READ)
    console.print(Text.assemble("learned · ", read, " · ", ("⟨marks⟩", MARK), "\n"))
    for row in range(min(args.rows, len(batch.filled))):
        only = Batch({k: v[row : row + 1] for k, v in batch.rows.items()}, batch.filled[row : row + 1], None, batch.bos_id)
        counts = only.counts()
        facts = [f"row {row} of {'update' if args.split == 'train' else 'validation batch'} {args.step + 1}"]
        if batch.sources is not None:
            facts.append(visible(os.fsencode(corpus.shares[batch.sources[row]].name), lines=False))
        if counts["documents"] is not None:
            facts.append(f"{counts['documents']} document{'s' * (counts['documents'] != 1)}")
        facts.append(f"{counts['learned']} learned, {counts['only_read']} only read, {counts['padding']} padding")
        console.print(Text(" · ".join(facts), "bold"))
        for line in row_text(batch, row, corpus.tokenizer, plain).split("\n", allow_blank=True):
            console.print(Text.assemble("│ ", line))
        console.print()
