"""Shows what the model sees: decoded batches, what is learned of them, and what the corpus is made of.

    python tools/inspect_data.py --config configs/base.py [--step 100] [--rows 2] [--split val] [-o data.svg]

The last line on stdout is one JSON object.
"""

if __name__ == "__main__":  # before the other imports, so that a signal is heard while they take their time
    from jaxlm import startup

    startup.tool("inspect_data.py")


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

from jaxlm import cli, runtime
from jaxlm.config import Config, UserError, show
from jaxlm.data import Corpus, Tokenizer, prepare
from jaxlm.data.inspect import (
    PADDING_EDGES,
    Batch,
    Documents,
    View,
    decoded,
    documents,
    learned_share,
    mixture_shares,
    token_counts,
    visible,
)
from jaxlm.data.tokenizers import to_bytes
from jaxlm.main import exit_code
from jaxlm.paths import user_path

SPLITS = ("train", "val")
TOP = 20  # most frequent tokens that are shown
READ, MARK = "dim", "bold cyan"  # styles of what is only read, and of what is no text
WIDTH, LINE = 1000, 18  # of the picture, in pixels
MAP_ROWS = 32  # of a batch in the picture, at most
COLORS = ("#4477aa", "#228833", "#aa3377", "#ee6677", "#ccbb44", "#66ccee")  # Tol's, for colour-blind eyes too


class Bar(NamedTuple):
    label: str
    share: float  # 0 to 1
    text: str  # the number, for people
    color: str = COLORS[0]


class Chart(NamedTuple):
    title: str
    note: str
    bars: list[Bar]


# Text


def row_text(batch: Batch, row: int, tokenizer: Tokenizer | None, plain: bool) -> Text:
    """A row, each document on a line of its own."""
    out = Text()
    for piece in batch.pieces(row):
        out.append("\n" * _begun(out))
        ids, learned = piece.ids.tolist(), list(map(bool, piece.learned))
        size = _number(piece.length, "token")
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
        out.append("\n" * _begun(out)).append(f"⟨padding · {_number(padding, 'place')}⟩", f"{MARK} {READ}")
    return out


def _number(number: int, what: str) -> str:
    return f"{number:,} {what}{'s' * (number != 1)}"


def _percent(share: float) -> str:
    """Tells what is none from what is little."""
    return "0" if share == 0 else "<0.01%" if share < 5e-5 else f"{share:.2%}"


def _begun(out: Text) -> bool:
    """Whether there is something on the last line."""
    return bool(out) and not out.plain.endswith("\n")


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


def source_name(name: str) -> str:
    return visible(to_bytes(name), lines=False)


# Charts


def token_chart(counts: np.ndarray, tokens: int, learned: float, corpus: Corpus) -> Chart:
    total, order = int(counts.sum()), np.argsort(-counts, kind="stable")[:TOP]
    sample = f", a sample, evenly spread over {tokens:,}" * (total < tokens)
    sources = " of all sources, each with all it has" * bool(corpus.shares)
    note = (
        f"{np.count_nonzero(counts):,} of {len(counts):,} ids occur; the {TOP} most frequent are"
        f" {counts[order].sum() / total:.1%} of all" + f"; {learned:.1%} are learned" * (learned < 1)
    )
    bars = []
    for i in order[counts[order] > 0].tolist():
        label = f"id {i}"
        if corpus.tokenizer is not None:
            text, is_text = decoded([i], corpus.tokenizer, lines=False)[0]
            label = _short(f"'{text}'" if is_text else text)
        share = float(counts[i] / total)
        bars.append(Bar(label, share, _percent(share)))
    return Chart(f"{_number(total, 'token')}{sources}{sample}", note, bars)


def _short(text: str) -> str:
    return text if len(text) <= 40 else f"{text[:30]}…{text[-9:]}"


def document_chart(found: Documents, seq_len: int) -> Chart:
    """Documents by their length, doubled from bar to bar."""
    lengths, n = found.lengths, len(found.lengths)
    if found.total is None:
        sample = ", the first of the corpus"
    else:
        sample = f", a sample, evenly spread over {found.total:,}" * (n < found.total)
    note = (
        f"{lengths.min():,} to {lengths.max():,} tokens with bos, half of them up to {int(np.median(lengths)):,};"
        f" {(lengths > seq_len).mean():.1%} longer than seq_len = {seq_len}"
    )
    by_size = np.bincount(np.frexp(lengths)[1] - 1) / n  # 1, 2 to 3, 4 to 7, ...
    sizes = range(int(np.flatnonzero(by_size)[0]), len(by_size))
    labels = [f"{2**k:,} to {2 ** (k + 1) - 1:,}" if k else "1" for k in sizes]
    bars = [Bar(label, float(by_size[k]), _percent(by_size[k])) for label, k in zip(labels, sizes, strict=True)]
    return Chart(f"{_number(n, 'document')}{sample}", note, bars)


def padding_chart(share: float, rows: np.ndarray) -> Chart:
    labels = ["none", *(f"{a:.0%} to {b:.0%}" for a, b in itertools.pairwise(PADDING_EDGES))]
    bars = [Bar(label, part, _percent(part)) for label, part in zip(labels, rows.tolist(), strict=True)]
    return Chart(f"{_percent(share)} of all places are padding", "rows by their share of it", bars)


def mixture_chart(mixture: list[dict], step: int, steps: int) -> Chart:
    bars = [
        Bar(source_name(m["source"]), m["batch"], f"{m['batch']:.1%} · so far {m['so_far']:.1%} · wanted"
            f" {m['wanted']:.1%} · {m['epochs']:.3g} epochs in all", COLORS[k % len(COLORS)])
        for k, m in enumerate(mixture)
    ]  # fmt: skip
    return Chart(f"sources of update {step + 1:,}", f"so far: in it and all before; in all: in {steps:,} updates", bars)


def print_chart(console: Console, chart: Chart) -> None:
    width = max(cell_len(bar.label) for bar in chart.bars)
    most = max(bar.share for bar in chart.bars) or 1.0
    console.print(Text(chart.title, "bold"))
    console.print(Text(chart.note))
    for bar in chart.bars:
        size = round(40 * bar.share / most)
        space = " " * (width - cell_len(bar.label) + 2)
        console.print(Text.assemble("  ", bar.label, space, ("█" * size, bar.color), " " * (size > 0), bar.text))
    console.print()


# The picture


def svg(batch: Batch, title: str, charts: list[Chart], corpus: Corpus) -> str:
    """A map of the batch and bars, as a picture that browsers show."""
    parts, y = _svg_map(batch, title, corpus.tokenizer)
    for chart in charts:
        most = max(bar.share for bar in chart.bars) or 1.0
        y += 3 * LINE
        parts += [_svg_text(16, y - LINE, chart.title, "font-weight='bold'"), _svg_text(16, y, chart.note)]
        for bar in chart.bars:
            y += LINE
            size = 240 * bar.share / most
            parts += [
                _svg_text(300, y, _short(bar.label), "text-anchor='end'"),
                f"<rect x='308' y='{y - 12}' width='{size:.1f}' height='14' fill='{bar.color}'/>",
                _svg_text(316 + size, y, bar.text, "fill='#555'"),
            ]
    height = y + LINE
    head = (
        f"<svg xmlns='http://www.w3.org/2000/svg' width='{WIDTH}' height='{height}' viewBox='0 0 {WIDTH} {height}'"
        " font-family='monospace' font-size='12'>"
    )
    return "\n".join([head, "<rect width='100%' height='100%' fill='white'/>", *parts, "</svg>", ""])


def _svg_text(x: float, y: float, text: str, style: str = "") -> str:
    return f"<text x='{x:.1f}' y='{y}' xml:space='preserve' {style}>{escape(text)}</text>"


def _svg_map(batch: Batch, title: str, tokenizer: Tokenizer | None) -> tuple[list[str], int]:
    """The batch's rows, one below the other: documents in turn dark and light, pale where nothing is learned; and the
    height of it all.
    """
    T, left, y = batch.rows["inputs"].shape[1], 16, 56
    scale = (WIDTH - 2 * left) / T
    parts = [_svg_text(left, 24, title, "font-weight='bold' font-size='14'"),
             _svg_text(left, 42, "documents dark and light in turn · pale: not learned · white: padding")]  # fmt: skip
    for row in range(min(MAP_ROWS, len(batch.filled))):
        color = COLORS[(0 if batch.sources is None else int(batch.sources[row])) % len(COLORS)]
        learned = batch.rows["targets"][row] >= 0
        for number, piece in enumerate(batch.pieces(row)):
            start = "".join(text for text, _ in decoded(piece.ids[:40].tolist(), tokenizer, lines=False))
            parts.append(f"<g><title>{escape(f'{piece.length} tokens: {start}')}</title>")
            for is_learned, group in itertools.groupby(range(piece.start, piece.start + piece.length), learned.item):
                places = list(group)
                opacity = (0.6 if number % 2 else 1) * (1 if is_learned else 0.3)
                x, size = left + places[0] * scale, len(places) * scale
                parts.append(f"<rect x='{x:.1f}' y='{y}' width='{size:.1f}' height='11' fill='{color}'"
                             f" fill-opacity='{opacity:.2f}'/>")  # fmt: skip
            parts.append("</g>")
        y += 13
    return parts, y


# The command line


def check_args(args: argparse.Namespace, config: Config) -> None:
    """Raises UserError where an option is no good, before any data is read."""
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
            raise UserError(f"-o is {show(args.output)}, which cannot be written; allowed: a file that can be, in a "
                            "folder that is there")  # fmt: skip


def parse() -> tuple[argparse.Namespace, Config]:
    parser = cli.Parser(
        prog="inspect_data.py", allow_abbrev=False, epilog="Any key can be set: --config.seq_len=512",
        description="Shows what the model sees: decoded batches, what is learned of them, and histograms.",
    )  # fmt: skip
    parser.add_argument("--config", required=True, metavar="FILE", help="a file of configs/")
    parser.add_argument("--split", default="train", help="train or val (default: train)")
    parser.add_argument("--step", type=int, default=0, metavar="N", help="the batch after N updates (default: 0)")
    parser.add_argument("--rows", type=int, metavar="R", help="of the batch that are printed (default: 4)")
    parser.add_argument("-o", "--output", metavar="FILE.svg", help="a picture of the batch and the histograms")
    args, overrides = parser.parse_known_args()
    config = cli.load(user_path("--config", args.config), overrides)
    check_args(args, config)
    return args, config


def measure(view: View, batch: Batch, args: argparse.Namespace) -> tuple[dict, list[Chart]]:
    """The numbers of a batch and its corpus, as JSON, and the charts of them."""
    corpus, config, tokens = view.corpus, view.config, getattr(view.corpus, args.split)
    counts, learned = token_counts(tokens, corpus.vocab_size), learned_share(tokens)
    mixture, (padding, rows) = mixture_shares(view, batch, args.step), view.padding()
    charts = [mixture_chart(mixture, args.step, config.steps)] if mixture else []
    charts.append(token_chart(counts, len(tokens), learned, corpus))
    found = documents(corpus, args.split)
    if found:
        charts.append(document_chart(found, config.seq_len))
    if config.data.packing == "document":
        charts.append(padding_chart(padding, rows))
    top = np.argsort(-counts, kind="stable")[:TOP].tolist()
    facts = {
        "split": args.split, "step": args.step, "seq_len": config.seq_len, "batch": batch.counts(),
        "tokens": {"total": len(tokens), "counted": int(counts.sum()), "distinct": int(np.count_nonzero(counts)),
                   "vocab_size": corpus.vocab_size, "learned_share": learned,
                   "most_frequent": [[i, int(counts[i])] for i in top if counts[i]]},
        "documents": found and found.summary(config.seq_len), "padding_share": padding, "mixture": mixture,
    }  # fmt: skip
    return facts, charts


def main() -> int:
    args, config = parse()
    corpus = prepare(config)
    view = View(corpus, config, args.split)
    if args.step >= view.num_batches:
        raise UserError(f"--step is {args.step}; allowed with --split=val: 0 to {view.num_batches - 1}")
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a terminal that lacks characters is no reason to stop
    batch = view.batch(args.step)
    facts, charts = measure(view, batch, args)
    if args.output is not None:  # first: what is printed may be cut short by `| head`
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


if __name__ == "__main__":
    runtime.leave(exit_code(main, "inspect_data.py"))
