"""Bar charts of a corpus for the terminal, and a picture of them and of a batch, for inspect.py."""

import itertools
from typing import NamedTuple
from xml.sax.saxutils import escape

import numpy as np
from rich.cells import cell_len
from rich.console import Console
from rich.text import Text

from jaxlm.config import Config
from jaxlm.data import Corpus, Tokenizer
from jaxlm.data.inspect import PADDING_EDGES, Documents, InspectedBatch, PairFacts, decoded, visible
from jaxlm.data.tokenizers import to_bytes

TOP = 20  # number of most frequent tokens shown
WIDTH, LINE = 1000, 18  # width and line height of the picture, in pixels
MAP_ROWS = 32  # most rows of a batch in the picture
COLORS = ("#4477aa", "#228833", "#aa3377", "#ee6677", "#ccbb44", "#66ccee")  # Paul Tol's, also for color-blind readers


class Bar(NamedTuple):
    label: str
    share: float  # 0 to 1
    text: str  # the number as it is shown
    color: str = COLORS[0]


class Chart(NamedTuple):
    title: str
    note: str
    bars: list[Bar]


def counted(number: int, what: str) -> str:
    return f"{number:,} {what}{'s' * (number != 1)}"


def _percent(share: float) -> str:
    """Formats a share; distinguishes zero from very little."""
    return "0" if share == 0 else "<0.01%" if share < 5e-5 else f"{share:.2%}"


def source_name(name: str) -> str:
    return visible(to_bytes(name), lines=False)


def token_chart(counts: np.ndarray, tokens: int, learned: float, corpus: Corpus) -> Chart:
    total, order = int(counts.sum()), np.argsort(-counts, kind="stable")[:TOP]
    sample = f", a sample, evenly spread over {tokens:,}" * (total < tokens)
    sources = " of all sources, each in full" * bool(corpus.shares)
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
    return Chart(f"{counted(total, 'token')}{sources}{sample}", note, bars)


def _short(text: str) -> str:
    return text if len(text) <= 40 else f"{text[:30]}…{text[-9:]}"


def limits_note(found: Documents, config: Config, pairs: PairFacts | None) -> str:
    """How many documents, or how many prompts and answers, are longer than their rows."""
    if pairs is None:
        return f"{(found.lengths > config.seq_len).mean():.1%} longer than seq_len = {config.seq_len}"
    return (
        f"prompts: median {pairs.median_prompt:,}, longest {pairs.longest_prompt:,},"
        f" {pairs.longer_prompts:.1%} longer than model.encoder_len = {config.model.encoder_len};"
        f" answers: median {pairs.median_answer:,}, longest {pairs.longest_answer:,},"
        f" {pairs.longer_answers:.1%} longer than seq_len = {config.seq_len}"
    )


def document_chart(found: Documents, limits: str) -> Chart:
    """Documents by length, which doubles from bar to bar."""
    lengths, n = found.lengths, len(found.lengths)
    if found.total is None:
        sample = ", the first of the corpus"
    else:
        sample = f", a sample, evenly spread over {found.total:,}" * (n < found.total)
    note = f"{lengths.min():,} to {lengths.max():,} tokens with bos, median {int(np.median(lengths)):,}; {limits}"
    by_size = np.bincount(np.frexp(lengths)[1] - 1) / n  # 1, 2 to 3, 4 to 7, ...
    sizes = range(int(np.flatnonzero(by_size)[0]), len(by_size))
    labels = [f"{2**k:,} to {2 ** (k + 1) - 1:,}" if k else "1" for k in sizes]
    bars = [Bar(label, float(by_size[k]), _percent(by_size[k])) for label, k in zip(labels, sizes, strict=True)]
    return Chart(f"{counted(n, 'document')}{sample}", note, bars)


def padding_chart(share: float, rows: np.ndarray, of_prompts: float | None = None) -> Chart:
    labels = ["none", *(f"{a:.0%} to {b:.0%}" for a, b in itertools.pairwise(PADDING_EDGES))]
    bars = [Bar(label, part, _percent(part)) for label, part in zip(labels, rows.tolist(), strict=True)]
    title, whose = f"{_percent(share)} of all places are padding", ""
    if of_prompts is not None:
        title = f"{_percent(share)} of the decoder's places are padding, {_percent(of_prompts)} of the encoder's"
        whose = "the decoder's "
    return Chart(title, f"{whose}rows by their share of padding", bars)


def mixture_chart(mixture: list[dict], step: int, steps: int) -> Chart:
    bars = []
    for k, m in enumerate(mixture):
        text = f"{m['batch']:.1%} · so far {m['so_far']:.1%} · wanted {m['wanted']:.1%}"
        text += f" · {m['epochs']:.3g} epochs in all"
        bars.append(Bar(source_name(m["source"]), m["batch"], text, COLORS[k % len(COLORS)]))
    note = f"so far: in updates 1 to {step + 1:,}; in all: in {steps:,} updates"
    return Chart(f"sources of update {step + 1:,}", note, bars)


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


def svg(batch: InspectedBatch, title: str, charts: list[Chart], corpus: Corpus) -> str:
    """Returns an SVG picture with a map of the batch and the charts."""
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


def _svg_map(batch: InspectedBatch, title: str, tokenizer: Tokenizer | None) -> tuple[list[str], int]:
    """Returns the rows of the batch, one below the other, and their height. Documents alternate between dark and light;
    pale tokens are not learned.
    """
    T, left, y = batch.rows["inputs"].shape[1], 16, 56
    scale = (WIDTH - 2 * left) / T
    parts = [
        _svg_text(left, 24, title, "font-weight='bold' font-size='14'"),
        _svg_text(left, 42, "documents alternate between dark and light · pale: not learned · white: padding"),
    ]
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
                parts.append(
                    f"<rect x='{x:.1f}' y='{y}' width='{size:.1f}' height='11' fill='{color}'"
                    f" fill-opacity='{opacity:.2f}'/>"
                )
            parts.append("</g>")
        y += 13
    return parts, y
