"""Writes a page of charts and tables as one HTML file, which needs no network; shows tables elsewhere, too.

uPlot draws the charts in the browser (jaxlm/run/page/uplot.js, MIT license), and Jinja fills in the page.
"""

import functools
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from jaxlm.config import UserError
from jaxlm.host.durable import write_whole

if TYPE_CHECKING:
    from jinja2 import Template

WIDEST = 1000  # columns of a table in the terminal, which wraps longer lines itself
MANY = 4  # curves of a chart; with more, its dashed ones are not in the legend, and come and go with theirs
FOLDER = Path(__file__).with_name("page")


class Lines(NamedTuple):
    """Curves over one axis."""

    title: str
    x: str  # name of the axis
    y: str
    curves: dict[str, tuple[Sequence[float], Sequence[float]]]  # {name: (x, y)}, with x rising
    log_x: bool = False
    log_y: bool = False
    note: str = ""
    dashed: Mapping[str, str] = {}  # {curve: the one whose color it has}
    faint: Mapping[str, str] = {}  # the same; comes and goes with that one, and is not in the legend
    ordered: bool = False  # colors change gradually from the first curve to the last


class Bar(NamedTuple):
    label: str
    value: float
    text: str  # the value as it is shown


class Bars(NamedTuple):
    """A bar for each value, the longest of them or `whole` as wide as the page."""

    title: str
    bars: list[Bar]
    whole: float = 0.0
    note: str = ""


class Table(NamedTuple):
    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]  # numbers but for the first column
    note: str = ""
    words: bool = False  # text in all columns
    folded: bool = False  # until the reader unfolds it


class Texts(NamedTuple):
    """Texts below each other, with their line breaks."""

    title: str
    texts: Sequence[tuple[str, str]]  # [(heading, text)]
    note: str = ""


Part = Lines | Bars | Table | Texts
MARK = '<meta name="generator" content="jaxlm">'  # in the head of every page


def check_path(option: str, path: Path) -> None:
    """Raises UserError unless a page can be written there, before the work that it shows.

    A page may replace a page, but no other file.
    """
    folder = path.absolute().parent
    if not folder.is_dir() or path.is_dir():
        raise UserError(f"{option} is {path}; allowed: a file in a folder that exists")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise UserError(f"{option} is {path}; allowed: a file in a folder that you may write to")
    if path.exists() and not _is_page(path):
        raise UserError(f"{option} is {path}, which is there and no page of jaxlm; allowed: a new file, or such a page")


def _is_page(path: Path) -> bool:
    if not path.is_file():
        return False
    try:
        with path.open("rb") as file:
            return MARK.encode() in file.read(1000)
    except OSError:
        return False


def write_page(path: Path, title: str, summary: str, parts: Sequence[Part]) -> None:
    """Writes the page whole or not at all.

    Raises:
      UserError: the file cannot be written.
    """
    charts = [_chart(part) for part in parts if isinstance(part, Lines)]
    text = _template().render(
        mark=MARK,
        title=title,
        summary=summary,
        parts=[(type(part).__name__, part) for part in parts],
        # "<" would end the script that holds the numbers.
        charts=json.dumps(charts).replace("<", "\\u003c"),
        script=(FOLDER / "uplot.js").read_text(),
        style=(FOLDER / "uplot.css").read_text(),
    )
    try:
        write_whole(path, text.encode("utf-8", "replace").decode())  # names of files may hold what UTF-8 cannot write
    except OSError as error:
        raise UserError(
            f"{path}: cannot be written ({error.strerror or error}); allowed: a file in a folder"
        ) from error


@functools.cache
def _template() -> "Template":
    from jinja2 import Environment, FileSystemLoader

    environment = Environment(loader=FileSystemLoader(FOLDER), autoescape=True, trim_blocks=True, lstrip_blocks=True)
    return environment.get_template("page.html")


def print_text(text: object) -> None:
    """Prints one line in the terminal, however wide."""
    from rich.console import Console

    Console(emoji=False, highlight=False, soft_wrap=True).print(text)


def print_table(table: Table) -> None:
    """Prints a table in the terminal, without its title."""
    from rich.console import Console
    from rich.table import Table as Grid

    grid = Grid(*table.columns, box=None)
    for row in table.rows:
        grid.add_row(*row)
    Console(emoji=False, highlight=False, soft_wrap=True, width=WIDEST).print(grid)


def markdown(table: Table) -> str:
    """The table in Markdown, without its title."""
    rows = [table.columns, ["---"] * len(table.columns), *table.rows]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def _chart(lines: Lines) -> dict:
    """What the page's script reads of a chart."""
    names, like = list(lines.curves), {**lines.dashed, **lines.faint}
    own = [name for name in names if name not in like]
    leaders = like if len(own) > MANY else lines.faint
    return {
        "x": lines.x,
        "y": lines.y,
        "log": [lines.log_x, lines.log_y],
        "names": names,
        "ordered": lines.ordered,
        "colors": [own.index(like.get(name, name)) for name in names],
        "dashed": [name in lines.dashed for name in names],
        "faint": [name in lines.faint for name in names],
        "follows": [names.index(leaders[name]) if name in leaders else None for name in names],
        "data": [[list(x), list(y)] for x, y in lines.curves.values()],
    }
