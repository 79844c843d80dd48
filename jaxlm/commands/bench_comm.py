"""Shows what a step moves between devices: the bytes and the place of each collective in the compiled program, beside
the strategy's formula. Runs nothing.

Bytes are those that one device sends. The last line of output is one JSON object. On CPU, devices are simulated:
--config.parallel.devices=8.
"""

import json
from collections import defaultdict
from typing import Any

from jaxlm.config import Config, UserError, cli, files
from jaxlm.config.paths import user_path
from jaxlm.host import runtime
from jaxlm.plan.collectives import Collective, collectives
from jaxlm.plan.compiled import Compiled, compile_step
from jaxlm.plan.program import parse

# XLA merges some exchanges with equal ones: on CPU, gathers of an unrolled layer; keys and values of a ring of two, if
# the backward pass computes attention again.
LESS = 0.5
AGREE = 1e-3  # largest relative difference between formula and program, besides scalars in the same collective


def main(argv: list[str]) -> int:
    parser = cli.config_parser("jaxlm bench comm", __doc__)
    parser.add_argument(
        "--vocab_size", type=int, metavar="V", help="replaces the vocabulary size of the configuration's data"
    )
    args, overrides = parser.parse_known_args(argv)
    config = files.load(user_path("--config", args.config), overrides)
    runtime.check_batch(config, config.parallel.devices, 1)
    runtime.configure_jax(config, 1)
    if args.vocab_size is not None and args.vocab_size < 2:
        raise UserError(f"--vocab_size is {args.vocab_size}; allowed: 2 or more")
    print(json.dumps(report(config, args.vocab_size)))
    return 0


def report(config: Config, vocab_size: int | None) -> dict[str, Any]:
    """Prints the table; returns the numbers."""
    from rich.console import Console
    from rich.table import Table

    devices = runtime.choose_devices(config)
    found, formulas = measure(config, devices, vocab_size)
    table = Table("purpose", "where", "collective", "dtypes", "times", "MB sent per step", box=None)
    rows: dict[tuple[str, ...], float] = defaultdict(float)
    counts: dict[tuple[str, ...], int] = defaultdict(int)
    by_purpose: dict[str, float] = defaultdict(float)
    for c in found:
        key = (purpose(c), c.where, c.kind, c.dtypes)
        rows[key] += c.sent * c.times
        counts[key] += c.times
        by_purpose[purpose(c)] += c.sent * c.times
    for key in sorted(rows, key=lambda k: -rows[k]):
        table.add_row(*key, str(counts[key]), f"{rows[key] / 1e6:.4g}")
    console = Console(emoji=False, highlight=False, soft_wrap=True)
    console.print(table)
    total = sum(by_purpose.values())
    console.print(f"total {total / 1e6:.4g} MB per step and device, on {len(devices)} x {devices[0].device_kind}")
    agree = {}
    for what, formula in formulas.items():
        sent = by_purpose[what]
        agree[what] = abs(sent - formula) <= AGREE * formula + 64
        if (what == "parameters" and config.parallel.zero == 3) or what == "context":
            agree[what] |= LESS * formula < sent < formula
        how = {"gradients": f" by {config.parallel.reduce}", "parameters": f" with ZeRO-{config.parallel.zero}"}
        console.print(
            f"{what}{how.get(what, '')}: {sent / 1e6:.4g} MB, by the formula {formula / 1e6:.4g} MB"
            + ("" if agree[what] else ": they do not agree")
        )
    return {
        "devices": len(devices),
        "reduce": config.parallel.reduce,
        "bytes_sent": {k: round(v) for k, v in by_purpose.items()},
        **{f"{what.removesuffix('s')}_bytes_by_formula": round(formula) for what, formula in formulas.items()},
        "agrees": all(agree.values()),
        "collectives": [c._asdict() | {"sent": c.sent} for c in found],
    }


def purpose(c: Collective) -> str:
    """Returns what a collective exchanges: gradients, parameters, the optimizer's work, what the devices of a replica
    compute together (by the direction of the grid), or numbers such as the loss.
    """
    from jaxlm.sync.cuts import COPIES
    from jaxlm.sync.gradients import GRADIENTS
    from jaxlm.sync.sharing import LAYERS
    from jaxlm.sync.zero import PARAMETERS

    known = {COPIES: "copies", GRADIENTS: "gradients", PARAMETERS: "parameters", LAYERS: "optimizer"}
    found = next((what for name, what in known.items() if name in c.name), None)
    return found or (c.direction if c.direction != "data" else "numbers of the step")


def measure(config: Config, devices: list[Any], vocab_size: int | None) -> tuple[list[Collective], dict[str, float]]:
    """Returns the collectives of the compiled step, and what the formulas say."""
    from jaxlm import data

    vocab_size = vocab_size or data.prepare(config).vocab_size
    found = compile_step(config, devices, vocab_size)
    return collectives(parse(found.text)), by_formula(config, vocab_size, found)


def by_formula(config: Config, vocab_size: int, step: Compiled) -> dict[str, float]:
    """Bytes that a device sends for each purpose, by the formulas."""
    from jaxlm.model import make_model
    from jaxlm.plan.exchanged import by_purpose
    from jaxlm.train.one_device import one_device

    model = make_model(config.model, vocab_size, config.seq_len, step.platform)
    return by_purpose(config, one_device(config, model, step.count, step.platform))
