"""Shows what the model sees: decoded batches, which tokens are learned (count towards the loss), and histograms.

    jaxlm inspect --config base [--step 100] [--rows 2] [--split val] [-o data.svg]

The last line on stdout is one JSON object.
"""

import argparse
import io
import itertools
import json
import os
import sys
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.text import Text

from jaxlm.commands.inspect_charts import (
    MAP_ROWS,
    TOP,
    Chart,
    counted,
    document_chart,
    limits_note,
    mixture_chart,
    padding_chart,
    print_chart,
    source_name,
    svg,
    token_chart,
)
from jaxlm.config import Config, UserError, cli, files, show
from jaxlm.config.paths import user_path
from jaxlm.data import Corpus, Tokenizer, prepare
from jaxlm.data.inspect import (
    InspectedBatch,
    View,
    decoded,
    documents,
    learned_share,
    mixture_shares,
    pair_facts,
    token_counts,
)

SPLITS = ("train", "val")
READ, MARK = "dim", "bold cyan"  # styles of tokens that are only read, and of marks that are not text


def row_text(batch: InspectedBatch, row: int, tokenizer: Tokenizer | None, plain: bool) -> Text:
    """Returns a row of a batch, with each document on its own lines."""
    out = Text()
    for piece in batch.pieces(row):
        out.append("\n" * _begun(out))
        ids, learned = piece.ids.tolist(), list(map(bool, piece.learned))
        size = counted(piece.length, "token")
        size = f"prompt of {piece.prompt_length}, answer of {size}" if piece.prompt_length else size
        if piece.opens is False:
            out.append(f"⟨continued · {size}⟩", MARK)
        for is_learned, group in itertools.groupby(range(len(ids)), learned.__getitem__):
            places = list(group)
            parts = decoded([ids[i] for i in places], tokenizer)
            if piece.opens and places[0] == 0:
                parts[0] = (f"⟨bos · {size}⟩", False)
            _append(out, parts, is_learned, plain)
    padding = batch.rows["inputs"].shape[1] - int(batch.filled[row])
    if padding:
        out.append("\n" * _begun(out)).append(f"⟨padding · {counted(padding, 'place')}⟩", f"{MARK} {READ}")
    return out


def _begun(out: Text) -> bool:
    """Whether the last line has text."""
    return bool(out) and not out.plain.endswith("\n")


def _append(out: Text, parts: list[tuple[str, bool]], learned: bool, plain: bool) -> None:
    """Adds text and marks. Without styles, ‹ and › enclose what is not learned."""
    out.append("‹" * (plain and not learned))
    for text, is_text in parts:
        out.append(text, " ".join([MARK] * (not is_text) + [READ] * (not learned)))
    out.append("›" * (plain and not learned))


def print_batch(console: Console, batch: InspectedBatch, args: argparse.Namespace, corpus: Corpus, plain: bool) -> None:
    read = Text("‹not learned›" if plain else "not learned", READ)
    console.print(Text.assemble("learned · ", read, " · ", ("⟨marks⟩", MARK), "\n"))
    for row in range(min(args.rows, len(batch.filled))):
        counts = batch.counts(slice(row, row + 1))
        facts = [f"{_batch_name(args)} · row {row + 1} of {len(batch.filled)}"]
        if batch.sources is not None:
            facts.append(source_name(corpus.shares[batch.sources[row]].name))
        if counts["documents"] is not None:
            facts.append(f"documents: {counts['documents']}")
        facts.append("targets: " + ", ".join(f"{counts[k]} {k}" for k in ("learned", "masked", "padding") if counts[k]))
        console.print(Text(" · ".join(facts), "bold"))
        for line in row_text(batch, row, corpus.tokenizer, plain).split("\n", allow_blank=True):
            console.print(Text.assemble("│ ", line))
        console.print()


def _batch_name(args: argparse.Namespace) -> str:
    return f"update {args.step + 1:,}" if args.split == "train" else f"validation batch {args.step + 1:,}"


def check_args(args: argparse.Namespace, config: Config) -> None:
    """Raises UserError, before any data is read, if an option is wrong."""
    if args.split not in SPLITS:
        raise UserError(f"--split is {show(args.split)}; allowed: {', '.join(SPLITS)}")
    last = f" to steps - 1 = {config.steps - 1}" if args.split == "train" else " or more"
    if args.step < 0 or (args.split == "train" and args.step >= config.steps):
        raise UserError(f"--step is {show(args.step)}; allowed: 0{last}")
    args.rows = min(4, config.batch_size) if args.rows is None else args.rows
    if not 1 <= args.rows <= config.batch_size:
        raise UserError(f"--rows is {show(args.rows)}; allowed: 1 to batch_size = {config.batch_size}")
    if args.output is not None:
        path = user_path("-o", args.output)
        if path.suffix != ".svg":
            raise UserError(f"-o is {show(args.output)}; allowed: a path that ends in .svg")
        fine = path.is_file() if path.exists() else path.parent.is_dir()
        if not fine or not os.access(path if path.exists() else path.parent, os.W_OK):
            raise UserError(
                f"-o is {show(args.output)}, which cannot be written; allowed: a writable file in an existing folder"
            )


def parse(argv: list[str]) -> tuple[argparse.Namespace, Config]:
    parser = cli.config_parser(
        "jaxlm inspect",
        "Shows what the model sees: decoded batches, which tokens are learned (count towards the loss), and histograms"
        " of the corpus.",
    )
    parser.add_argument("--split", default="train", help="split to show: train or val (default: train)")
    parser.add_argument("--step", type=int, default=0, metavar="N", help="show the batch after N updates (default: 0)")
    parser.add_argument("--rows", type=int, metavar="R", help="number of rows to print (default: 4)")
    parser.add_argument("-o", "--output", metavar="FILE.svg", help="write a picture of the batch and the histograms")
    args, overrides = parser.parse_known_args(argv)
    config = files.load(user_path("--config", args.config), overrides)
    check_args(args, config)
    return args, config


def measure(view: View, batch: InspectedBatch, args: argparse.Namespace) -> tuple[dict, list[Chart]]:
    """Returns facts about a batch and its corpus, as JSON, and charts of them."""
    corpus, config, tokens = view.corpus, view.config, getattr(view.corpus, args.split)
    counts, learned = token_counts(tokens, corpus.vocab_size), learned_share(tokens)
    mixture, (padding, rows) = mixture_shares(view, batch, args.step), view.padding()
    charts = [mixture_chart(mixture, args.step, config.steps)] if mixture else []
    charts.append(token_chart(counts, len(tokens), learned, corpus))
    found, pairs = documents(corpus, args.split), pair_facts(view)
    if found:
        charts.append(document_chart(found, limits_note(found, config, pairs)))
    if config.data.packing == "document":
        charts.append(padding_chart(padding, rows, pairs.prompt_padding if pairs else None))
    top = np.argsort(-counts, kind="stable")[:TOP].tolist()
    facts = {
        "split": args.split,
        "step": args.step,
        "seq_len": config.seq_len,
        "batch": batch.counts(),
        "tokens": {
            "total": len(tokens),
            "counted": int(counts.sum()),
            "distinct": int(np.count_nonzero(counts)),
            "vocab_size": corpus.vocab_size,
            "learned_share": learned,
            "most_frequent": [[i, int(counts[i])] for i in top if counts[i]],
        },
        "documents": found and found.summary(config.seq_len),
        "padding_share": padding,
        "pairs": pairs and pairs._asdict(),
        "mixture": mixture,
    }
    return facts, charts


def main(argv: list[str]) -> int:
    args, config = parse(argv)
    corpus = prepare(config)
    view = View(corpus, config, args.split)
    if args.step >= view.num_batches:
        raise UserError(f"--step is {args.step}; allowed with --split=val: 0 to {view.num_batches - 1}")
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # the terminal may lack characters
    batch = view.batch(args.step)
    facts, charts = measure(view, batch, args)
    if args.output is not None:  # before printing, which `| head` may cut short
        many = f"the first {MAP_ROWS} of " * (len(batch.filled) > MAP_ROWS)
        title = f"{_batch_name(args)}, {many}{len(batch.filled)} rows of {config.seq_len} tokens"
        try:
            Path(args.output).expanduser().write_text(svg(batch, title, charts, corpus), "utf-8")
        except OSError as error:
            raise UserError(
                f"-o is {show(args.output)}: {error.strerror}; allowed: a file that can be written"
            ) from error
    console = Console(highlight=False, soft_wrap=True)
    print_batch(console, batch, args, corpus, plain=console.color_system is None)
    for chart in charts:
        print_chart(console, chart)
    console.print(Text(json.dumps(facts | {"picture": args.output})))
    return 0
