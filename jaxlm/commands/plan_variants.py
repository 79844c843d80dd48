"""Plans variants of a configuration, each in a process of its own, because XLA reads its flags once: the other side of
a comparison, and changes that make a run fit.
"""

import json
import os
import subprocess
import sys
from typing import Any

from jaxlm.config import Config, UserError, refused_reductions
from jaxlm.host import signals


def planned(arguments: list[str]) -> dict[str, Any]:
    """The numbers of `jaxlm plan` with these arguments.

    Raises:
      UserError: with the line of that plan's own error.
    """
    return finished(start(arguments))


def start(arguments: list[str]) -> subprocess.Popen[str]:
    """Starts a plan. It sees no GPU, so that it takes nothing of a GPU's memory."""
    process = subprocess.Popen(
        [sys.executable, "-m", "jaxlm", "plan", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
    )
    signals.at_stop(process.kill)
    return process


def finished(plan: subprocess.Popen[str]) -> dict[str, Any]:
    """The numbers of a plan, when it is done."""
    out, errors = plan.communicate()
    if plan.returncode:
        last = (errors.splitlines() or ["it printed nothing"])[-1]
        raise UserError(last.removeprefix("jaxlm: "))
    return json.loads(out.splitlines()[-1])


def changes(config: Config, count: int) -> list[list[tuple[str, ...]]]:
    """Overrides that need less memory, in stages: single changes first, then combinations. All keep the batch."""
    p = config.parallel
    rows = config.batch_size * p.of_a_replica // count // config.optim.accum_steps  # of a micro-batch of a replica
    more = [f"optim.accum_steps={config.optim.accum_steps * n}" for n in (2, 4, 8, 16, 32) if rows % n == 0]
    remat = ["model.remat=full"] if config.model.remat != "full" else []
    further = [n for n in (1, 3) if count > 1 and p.zero < n and p.reduce not in refused_reductions(n)]
    if p.pipeline > 1:
        further = [n for n in further if n == 1]
    stages = [f"parallel.zero={n}" for n in further]
    last, zero = more[-1:], stages[-1:]
    singles = [(change,) for change in (*more[:2], *last, *remat, *stages)]
    pairs = [tuple(pair) for pair in (last + remat, last + zero, remat + zero) if len(pair) == 2]
    all_three = [tuple(last + remat + zero)] if len(last + remat + zero) == 3 else []
    return [list(dict.fromkeys(singles)), pairs, all_three]


def cheapest_fit(arguments: list[str], config: Config, count: int) -> tuple[tuple[str, ...], dict[str, Any]] | None:
    """The change with the shortest step among the fewest overrides that make the run fit, and its plan."""
    for stage in changes(config, count):
        plans = [(change, planned([*arguments, *(f"--config.{o}" for o in change)])) for change in stage]
        fitting = [(change, plan) for change, plan in plans if plan["fits"]]
        if fitting:
            return min(fitting, key=lambda found: found[1]["step_seconds"])
    return None


# {row of the comparison: (number in the summary, factor, format)}
ROWS = {
    "parameters, M": (("parameters",), 1e-6, ".1f"),
    "memory of a device, GB": (("memory_bytes", "total"), 1e-9, ".2f"),
    "of which kept for the backward pass": (("memory_bytes", "kept"), 1e-9, ".2f"),
    "moved in memory, GB a step": (("moved_bytes",), 1e-9, ".1f"),
    "products, TFLOP a step": (("product_flops",), 1e-12, ".2f"),
    "step, ms": (("step_seconds",), 1e3, ".2f"),
    "of which waiting for other devices": (("waiting_seconds",), 1e3, ".2f"),
    "tokens/s": (("tokens_per_second",), 1, ",.0f"),
    "MFU, %": (("mfu",), 100, ".1f"),
    "whole run, hours": (("hours",), 1, ",.1f"),
    "whole run, kWh": (("kilowatt_hours",), 1, ",.1f"),
}


def compared(a: dict[str, Any], b: dict[str, Any]) -> list[tuple[str, str, str, str]]:
    """[(what, number of a, number of b, b / a)]"""

    def number(summary: dict[str, Any], path: tuple[str, ...]) -> float:
        for key in path:
            summary = summary[key]
        return float(summary)  # pyright: ignore[reportArgumentType]

    rows = []
    for what, (path, factor, form) in ROWS.items():
        x, y = number(a, path) * factor, number(b, path) * factor
        rows.append((what, f"{x:{form}}", f"{y:{form}}", f"{y / x:.2f}" if x else ""))
    return rows
