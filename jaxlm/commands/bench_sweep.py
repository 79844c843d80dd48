"""Sweeps over values of keys for `jaxlm bench --grid`: one process each, because memory has its peak once."""

import argparse
import json
import subprocess
import sys
from typing import Any

from jaxlm.commands.bench_peers import check_torch
from jaxlm.config import files
from jaxlm.config.grid import Point, name_of, overrides, points
from jaxlm.config.paths import user_path
from jaxlm.host import signals
from jaxlm.run.pages import Bar, Bars, Lines, Table, check_path, print_table, write_page


def arguments(point: Point, config: str, given: list[str]) -> list[str]:
    """The point as arguments of `jaxlm bench`, after the given ones. Its key `config` is a configuration."""
    keys = {key: value for key, value in point.items() if key != "config"}
    return ["--config", point.get("config", config), *given, *overrides(keys)]


def sweep(args: argparse.Namespace, given: list[str]) -> int:
    """Measures all points; prints a table and one JSON object, and writes the page. Returns 2 if no point ran."""
    if args.html:
        check_path("--html", args.html)
    grid = points(args.grid)
    for point in grid:  # before the first is measured
        _, file, *changed = arguments(point, args.config, given)
        loaded = files.load(user_path("--config", file), changed)
        if args.torch:
            check_torch(loaded)
    options = ["--steps", str(args.steps), "--rounds", str(args.rounds), "--python", args.python]
    options += ["--nanogpt", str(args.nanogpt)] if args.nanogpt else []
    options += ["--torch"] if args.torch else []
    found = []
    for i, point in enumerate(grid):
        found.append(measured([*arguments(point, args.config, given), *options]))
        print(f"{i + 1}/{len(grid)} · {name_of(point)} · {_said(found[-1])}", flush=True)
    table = table_of(grid, found)
    print_table(table)
    if args.html:
        write_page(args.html, "jaxlm bench", _summary(args, found), [*_charts(grid, found), table])
        print(f"wrote {args.html}")
    print(json.dumps({"points": [{"point": p} | numbers for p, numbers in zip(grid, found, strict=True)]}))
    return 0 if any("error" not in numbers for numbers in found) else 2


def measured(arguments: list[str]) -> dict[str, Any]:
    """The numbers of `jaxlm bench` with these arguments, or the last line of its error as `error`."""
    command = [sys.executable, "-m", "jaxlm", "bench", *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    signals.at_stop(process.terminate)  # it stops its own processes
    out, errors = process.communicate()
    if process.returncode:
        return {"error": (errors.strip().splitlines() or [f"it ended with {process.returncode}"])[-1]}
    return json.loads(out.splitlines()[-1])


def _said(numbers: dict[str, Any]) -> str:
    if "error" in numbers:
        return f"failed: {numbers['error']}"
    return (
        f"{numbers['step_ms']:.4g} ms a step, {numbers['tokens_per_second']:,.0f} tokens/s,"
        f" {numbers['peak_memory_bytes'] / 1e9:.3g} GB"
    )


def _summary(args: argparse.Namespace, found: list[dict[str, Any]]) -> str:
    devices = next((numbers["devices"] for numbers in found if "error" not in numbers), "no device")
    return f"{args.config} on {devices}; medians and ranges of {args.rounds} rounds of {args.steps} steps."


COLUMNS = ("step, ms", "trainer, ms", "planned, ms", "tokens/s", "MFU", "memory, GB", "planned, GB")


def table_of(grid: list[Point], found: list[dict[str, Any]]) -> Table:
    peers = [name for name in ("nanogpt", "torch") if any(f"{name}_step_ms" in numbers for numbers in found)]
    titles = {"nanogpt": "nanoGPT", "torch": "PyTorch"}
    columns = [*grid[0], *COLUMNS]
    for peer in peers:
        columns += [f"{titles[peer]}, ms", "GB", "ours / theirs"]
    rows = [[*point.values(), *_row(numbers, peers)] for point, numbers in zip(grid, found, strict=True)]
    return Table("All numbers", columns, [row + [""] * (len(columns) - len(row)) for row in rows])


def _row(n: dict[str, Any], peers: list[str]) -> list[str]:
    if "error" in n:
        return ["failed"]
    row = [
        _with_range(n, "step"),
        _with_range(n, "trainer"),
        _number(n["planned_step_ms"], ".4g"),
        f"{n['tokens_per_second']:,.0f}",
        _number(n["mfu"], ".1%"),
        f"{n['peak_memory_bytes'] / 1e9:.3g}",
        _number(n["planned_memory_bytes"], ".3g", 1e-9),
    ]
    for peer in peers:
        if f"{peer}_step_ms" not in n:
            row += ["", "", ""]
            continue
        memory = _number(n[f"{peer}_peak_memory_bytes"], ".3g", 1e-9)
        row += [_with_range(n, f"{peer}_step"), memory, f"{n[f'step_over_{peer}']:.2f}"]
    return row


def _with_range(numbers: dict[str, Any], name: str) -> str:
    low, high = numbers[f"{name}_ms_range"]
    return f"{numbers[f'{name}_ms']:.4g} ({low:.4g} to {high:.4g})"


def _number(value: float | None, form: str, factor: float = 1.0) -> str:
    return "" if value is None else f"{value * factor:{form}}"


def _charts(grid: list[Point], found: list[dict[str, Any]]) -> list[Lines | Bars]:
    """Speed and memory: curves over the first key with three or more numbers, else bars."""
    ran = [(point, numbers) for point, numbers in zip(grid, found, strict=True) if "error" not in numbers]
    if not ran:
        return []
    axis = next((key for key in grid[0] if len(_numbers(grid, key)) > 2), None)
    if axis is None:
        speed = [(name_of(point), numbers["tokens_per_second"]) for point, numbers in ran]
        memory = [(name_of(point), numbers["peak_memory_bytes"]) for point, numbers in ran]
        return [
            Bars("Speed", [Bar(name, value, f"{value:,.0f} tokens/s") for name, value in speed]),
            Bars("Memory", [Bar(name, value, f"{value / 1e9:.3g} GB") for name, value in memory]),
        ]
    curves: dict[str, list[tuple[float, dict[str, Any]]]] = {}
    for point, numbers in ran:
        others = name_of({key: value for key, value in point.items() if key != axis}) or "measured"
        curves.setdefault(others, []).append((float(point[axis]), numbers))

    def lines(title: str, unit: str, key: str, factor: float) -> Lines:
        of = {name: sorted((x, n[key] * factor) for x, n in curve) for name, curve in curves.items()}
        return Lines(title, axis, unit, {k: ([x for x, _ in v], [y for _, y in v]) for k, v in of.items()})

    return [lines("Speed", "tokens/s", "tokens_per_second", 1.0), lines("Memory", "GB", "peak_memory_bytes", 1e-9)]


def _numbers(grid: list[Point], key: str) -> set[float]:
    """The values of a key, if all are numbers."""
    try:
        return {float(point[key]) for point in grid}
    except ValueError:
        return set()
