"""Writes a page of charts and tables as one HTML file, which needs no network; shows tables elsewhere, too.

uPlot draws the charts in the browser (jaxlm/run/page/uplot.js, MIT license), and Jinja fills in the page.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from jaxlm.config import UserError
from jaxlm.host.durable import write_whole

WIDEST = 1000  # columns of a table in the terminal, which wraps longer lines itself
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


def check_path(option: str, path: Path) -> None:
    """Raises UserError unless a page can be written there, before the work that it shows."""
    if not path.absolute().parent.is_dir() or path.is_dir():
        raise UserError(f"{option} is {path}; allowed: a file in a folder that exists")


def write_page(path: Path, title: str, summary: str, parts: Sequence[Lines | Bars | Table]) -> None:
    """Writes the page whole or not at all.

    Raises:
      UserError: the file cannot be written.
    """
    from jinja2 import Environment, FileSystemLoader

    environment = Environment(loader=FileSystemLoader(FOLDER), autoescape=True, trim_blocks=True, lstrip_blocks=True)
    charts = [_chart(part) for part in parts if isinstance(part, Lines)]
    text = environment.get_template("page.html").render(
        title=title,
        summary=summary,
        parts=[(type(part).__name__, part) for part in parts],
        # "<" would end the script that holds the numbers.
        charts=json.dumps(charts).replace("<", "\\u003c"),
        script=(FOLDER / "uplot.js").read_text(),
        style=(FOLDER / "uplot.css").read_text(),
    )
    try:
        write_whole(path, text)
    except OSError as error:
        raise UserError(
            f"{path}: cannot be written ({error.strerror or error}); allowed: a file in a folder"
        ) from error


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
    return {
        "x": lines.x,
        "y": lines.y,
        "log": [lines.log_x, lines.log_y],
        "names": list(lines.curves),
        "data": [[list(x), list(y)] for x, y in lines.curves.values()],
    }
