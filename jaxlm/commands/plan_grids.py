"""`jaxlm plan --recommend`: the ways to divide a run among devices that have the shortest step.

All ways that the configuration admits are estimated; the best ones are then compiled, as `jaxlm plan` does it, in
processes of their own.
"""

from typing import TYPE_CHECKING, Any

from jaxlm.commands.plan_variants import planned
from jaxlm.config import Config
from jaxlm.plan.devices import Device
from jaxlm.run.pages import Table, print_table, print_text

if TYPE_CHECKING:
    from jaxlm.plan.grids import Estimate  # imports jax, which reads its flags then

COMPILED = 3  # fitting ways that are compiled
TRIED = 8  # ways that are compiled at most
SHOWN = 8


def recommend(arguments: list[str], config: Config, device: Device, most: int, vocab_size: int) -> dict[str, Any]:
    """Prints the best ways and why the first is the best; returns the numbers.

    Args: arguments: of `jaxlm plan` for this run, without the number of devices.
    """
    from jaxlm.plan.grids import search

    found = search(config, device, most, vocab_size)
    plans: dict[int, dict[str, Any]] = {}
    for i, estimate in enumerate(found[:TRIED]):
        keys = [f"--config.{override}" for override in estimate.changes(config)]
        plans[i] = planned([*arguments, "--devices", str(estimate.devices), *keys])
        if sum(plan["fits"] for plan in plans.values()) == COMPILED:
            break
    shown = sorted(range(max(min(SHOWN, len(found)), len(plans))), key=lambda i: _order(plans.get(i)))
    best = next((i for i in shown if plans.get(i, {}).get("fits")), None)
    if best is None:
        print_text(f"no way fits on up to {most} devices of this kind")
    else:
        print_table(_ways([(found[i], plans.get(i)) for i in shown]))
        for table in _why(found[best], plans[best]):
            print_table(table)
        print_text(_result(found[best], plans[best], device, most, found[best].changes(config)))
    return {
        "device": device.name,
        "most_devices": most,
        "devices": None if best is None else found[best].devices,
        "recommended": None if best is None else found[best].changes(config),
        "ways": [_numbers(found[i], plans.get(i), found[i].changes(config)) for i in shown],
    }


def _order(plan: dict[str, Any] | None) -> tuple[int, float]:
    """Compiled ways that fit come first, the fastest before others; then those that are only estimated."""
    if plan is None:
        return 1, 0.0
    return (0, plan["step_seconds"]) if plan["fits"] else (2, 0.0)


def _ways(found: list[tuple["Estimate", dict[str, Any] | None]]) -> Table:
    """One row for each way; those that were compiled also have the numbers of their plans."""
    rows = []
    for e, plan in found:
        p = e.config.parallel
        data = e.devices // p.of_a_replica
        chunks = f" ({p.chunks} chunks)" if p.chunks > 1 else ""
        rows.append((
            str(e.devices),
            f"{data} x {p.pipeline} x {p.context} x {p.tensor}{chunks}",
            str(p.zero),
            str(e.config.optim.accum_steps),
            e.config.model.remat,
            f"{e.total / 1e9:.3g}",
            _milliseconds(e.time),
            f"{plan['memory_bytes']['total'] / 1e9:.3g}{'' if plan['fits'] else ': does not fit'}" if plan else "",
            _milliseconds(plan["step_seconds"]) if plan else "",
            f"{plan['mfu']:.1%}" if plan else "",
        ))  # fmt: skip
    columns = ("devices", "data x pipeline x context x tensor", "ZeRO", "micro-batches", "remat", "GB, estimate",
               "ms, estimate", "GB, compiled", "ms, compiled", "MFU")  # fmt: skip
    return Table("The best ways", columns, rows)


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:,.0f}" if seconds >= 0.1 or not seconds else f"{seconds * 1e3:.3g}"


def _why(best: "Estimate", plan: dict[str, Any]) -> list[Table]:
    """Where the time of a step goes, and what devices send; and their memory."""
    names = {"computation": "computation", "bubble": "bubble of the pipeline"}
    sent = {"data": best.sent.get("gradients", 0) + best.sent.get("parameters", 0),
            "tensor": best.sent.get("tensor", 0) + best.sent.get("copies", 0)}  # fmt: skip
    seconds = {"data": 0.0} | best.seconds if sent["data"] else best.seconds
    rows = []
    for name, x in sorted(seconds.items(), key=lambda item: -item[1]):
        moved = sent.get(name, best.sent.get(name, 0))
        rows.append(
            (names.get(name, f"waiting for {name} groups"), _milliseconds(x), f"{moved / 1e9:.3g}" if moved else "")
        )
    memory = [(name, f"{x / 1e9:.3g}") for name, x in plan["memory_bytes"].items() if x >= 1e7]
    return [
        Table("Why", ("why: a step", "ms, estimate", "GB sent"), rows),
        Table("Memory", ("memory of a device, compiled", "GB"), memory),
    ]


def _result(best: "Estimate", plan: dict[str, Any], device: Device, most: int, changes: list[str]) -> str:
    unused = f" ({most - best.devices} of {most} stay without work)" if best.devices < most else ""
    keys = " ".join(f"--config.{change}" for change in changes) or "the keys of the configuration"
    return (
        f"on {best.devices} x {device.name}{unused}, a step takes {plan['step_seconds'] * 1e3:,.4g} ms,"
        f" {plan['mfu']:.1%} of the devices' FLOP/s, with {keys}"
    )


def _numbers(e: "Estimate", plan: dict[str, Any] | None, changes: list[str]) -> dict[str, Any]:
    compiled = None
    if plan:
        compiled = {key: plan[key] for key in ("memory_bytes", "fits", "step_seconds", "waiting_seconds", "mfu")}
    return {
        "devices": e.devices,
        "overrides": changes,
        "memory_bytes": {**e.memory, "total": e.total},
        "seconds": {**e.seconds, "total": e.time},
        "sent_bytes": e.sent,
        "compiled": compiled,
    }
