"""Grids of values on a command line, `--grid optim.lr=1e-4,3e-4 --grid seed=0,1`: every combination is a point."""

import csv
import itertools

from jaxlm.config import UserError, show

Point = dict[str, str]  # {key: value as it is typed}


def points(grid: list[str]) -> list[Point]:
    """All combinations of `["KEY=A,B", ...]`; the last key changes first. A value in double quotes may hold commas.

    Raises:
      UserError: an argument has another form.
    """
    values = {}
    for argument in grid:
        key, _, text = argument.removeprefix("config.").partition("=")
        found = _values(text)
        if not (key and found and all(found)):
            raise UserError(f"--grid is {show(argument)}; allowed: KEY=A,B with one or more values")
        if key in values:
            raise UserError(f"--grid names {key} twice; allowed: once, with all values")
        values[key] = found
    return [dict(zip(values, chosen, strict=True)) for chosen in itertools.product(*values.values())]


def _values(text: str) -> list[str]:
    """The values between commas; none if a quote is wrong."""
    try:
        return next(csv.reader([text], strict=True), [])
    except csv.Error:
        return []


def overrides(point: Point) -> list[str]:
    """The point as arguments that set its keys."""
    return [f"--config.{key}={value}" for key, value in point.items()]


def name_of(point: Point, between: str = " ") -> str:
    return between.join(f"{key}={value}" for key, value in point.items())
