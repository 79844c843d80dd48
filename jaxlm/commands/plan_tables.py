"""The tables of a plan, for the terminal and for its page."""

from pathlib import Path
from typing import Any

from jaxlm.plan.planning import Plan
from jaxlm.run.pages import Bar, Bars, Lines, Table, write_page

MEMORY = {"average": "moving average", "reduction": "state of the reduction", "kept": "kept for the backward pass",
          "process": "the process itself"}  # fmt: skip


def headline(plan: Plan) -> str:
    each = plan.config.parallel.of_a_replica
    rows, unit = plan.config.batch_size * each // plan.count, "device" if each == 1 else f"replica of {each} devices"
    return (
        f"{plan.parameters / 1e6:.1f} M parameters on {plan.count} x {plan.device.name} ({plan.device.source}),"
        f" {rows} x {plan.config.seq_len} tokens a {unit} and step"
    )


def result(plan: Plan) -> str:
    steps, seconds = plan.config.steps, plan.time.seconds
    return (
        f"a step takes {seconds * 1e3:.4g} ms, {plan.time.waiting * 1e3:.3g} of them waiting for other devices:"
        f" {plan.tokens / seconds:,.0f} tokens/s, {plan.mfu:.1%} of the devices' FLOP/s;"
        f" {steps:,} steps take {plan.hours:,.1f} hours"
        + (f" and at most {plan.kilowatt_hours:,.1f} kWh" if plan.device.watts else "")
    )


def tables(plan: Plan) -> list[Table]:
    found = [_memory(plan)]
    if plan.time.exchanges:
        found.append(_exchanges(plan))
    found.append(_costs(plan))
    if len(plan.curve) > 1:
        found.append(_curve(plan))
    return found


def _held(plan: Plan) -> list[tuple[str, float]]:
    """[(what a device holds, bytes)], without what is less than a thousandth of all"""
    least = plan.memory.total / 1000
    return [(MEMORY.get(name, name), value) for name, value in plan.memory._asdict().items() if value >= least]


def _memory(plan: Plan) -> Table:
    fits = "" if plan.fits else ": does not fit"
    rows = [(name, f"{value / 1e9:.3g}") for name, value in _held(plan)]
    rows.append(("all", f"{plan.memory.total / 1e9:.3g} of {plan.usable / 1e9:.3g}{fits}"))
    return Table("Memory of a device", ("memory of a device", "GB"), rows)


def _exchanges(plan: Plan) -> Table:
    rows = []
    for e in sorted(plan.time.exchanges, key=lambda e: -e.collective.times * e.seconds)[:10]:
        c = e.collective
        beside = f"{e.beside * 1e3:.3g} ({e.kernels})"
        rows.append((c.kind, c.where, str(c.times), f"{c.bytes / 1e6:.4g}", f"{e.seconds * 1e3:.3g}", beside))
    columns = ("collective", "where", "times", "MB", "ms each", "ms of kernels beside")
    return Table("The ten collectives that take longest", columns, rows)


def _costs(plan: Plan) -> Table:
    rows = []
    for cost in plan.time.by_source()[:10]:
        numbers = cost.seconds * 1e3, cost.bytes / 1e9, cost.flops / 1e12
        rows.append((cost.source or "elsewhere", *(f"{number:.3g}" for number in numbers)))
    return Table("The ten lines of code that cost most", ("largest costs", "ms a step", "GB", "TFLOP"), rows)


def _curve(plan: Plan) -> Table:
    rows = [(str(n), f"{rate:,.0f}", f"{plan.curve[0][1] / seconds:.0%}") for n, seconds, rate in _rates(plan)]
    return Table("On more devices, with the same batch on each", ("devices", "tokens/s", "of linear"), rows)


def _rates(plan: Plan) -> list[tuple[int, float, float]]:
    """[(devices, seconds of a step, tokens/s)]; each device has the same part of the batch."""
    return [(n, seconds, plan.tokens * n / plan.count / seconds) for n, seconds in plan.curve]


def beside_table(a: str, b: str, rows: list[tuple[str, str, str, str]]) -> Table:
    return Table("Side by side", ("side by side", a, b, "ratio"), rows)


def write_plan(path: Path, plan: Plan, beside: Table | None) -> None:
    """Writes the plan as a page."""
    costs = plan.time.by_source()
    parts: list[Any] = [
        Bars(
            "Memory of a device",
            [Bar(name, value, f"{value / 1e9:.3g} GB") for name, value in _held(plan)],
            whole=plan.memory.total,
            note=f"{plan.memory.total / 1e9:.3g} GB of the {plan.usable / 1e9:.3g} that JAX takes"
            + ("" if plan.fits else ": it does not fit"),
        ),
        Bars(
            "Time of a step by line of code",
            [Bar(c.source or "elsewhere", c.seconds, f"{c.seconds * 1e3:.3g} ms · {c.bytes / 1e9:.3g} GB"
                 + (f" · {c.flops / 1e12:.3g} TFLOP" if c.flops else "")) for c in costs[:15]]
            + [Bar("waiting for other devices", plan.time.waiting, f"{plan.time.waiting * 1e3:.3g} ms")],
            note="Each kernel takes the longer of its products at the rate that a device reaches, and its bytes at the"
            " memory's bandwidth.",
        ),
    ]  # fmt: skip
    if beside:
        parts.insert(0, beside)
    if plan.time.exchanges:
        parts.append(_exchanges(plan))
    if len(plan.curve) > 1:
        counts, seconds, _ = zip(*_rates(plan), strict=True)
        share = [100 * seconds[0] / s for s in seconds]
        curve = Lines(
            "On more devices, with the same batch on each", "devices", "% of linear", {"planned": (counts, share)}
        )
        parts.append(curve._replace(log_x=True))
        parts.append(_curve(plan)._replace(title="The same as numbers"))
    write_page(path, f"jaxlm plan: {plan.count} x {plan.device.name}", f"{headline(plan)}: {result(plan)}.", parts)
