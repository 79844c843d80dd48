"""Says what a run would need, without running it: memory, time, communication, energy.

The training step is compiled for the devices, which need not be there, and the compiled program is read. Where JAX's
CUDA plugin is not installed, the program is one for CPUs, and only roughly what a GPU would run; `make plan-env` makes
an environment with the plugin. All numbers are planned, none is measured. The last line of output is one JSON object.
"""

import json
from typing import TYPE_CHECKING, Any

from jaxlm.commands.plan_variants import cheapest_fit, compared, planned
from jaxlm.config import Config, UserError, cli, files
from jaxlm.config.paths import user_path
from jaxlm.host import runtime
from jaxlm.plan import devices as known
from jaxlm.plan.compiled import can_compile_for_gpus, configure

if TYPE_CHECKING:
    from jaxlm.plan.planning import Plan  # imports jax, which reads its flags then

BYTES = 257  # tokens of the tokenizer `bytes`


def main(argv: list[str]) -> int:
    parser = cli.config_parser("jaxlm plan", __doc__)
    parser.add_argument("--devices", type=int, required=True, metavar="N", help="number of devices, on all hosts")
    parser.add_argument("--device", required=True, metavar="NAME", help=", ".join([*known.DEVICES, known.CPU]))
    parser.add_argument(
        "--vocab_size", type=int, metavar="V", help="number of tokens, where the configuration does not say it"
    )
    parser.add_argument(
        "--compare",
        metavar="FILE",
        help="another configuration, planned for the same devices and shown beside the first",
    )
    args, overrides = parser.parse_known_args(argv)
    config = files.load(user_path("--config", args.config), overrides)
    if args.devices < 1:
        raise UserError(f"--devices is {args.devices}; allowed: 1 or more")
    device = known.find(args.device, args.devices)
    few = min(args.devices, device.per_host)
    if args.devices % few:
        allowed = f"up to {few}, the devices of a host, or a multiple of {few}"
        raise UserError(f"--devices is {args.devices}; allowed with --device {args.device}: {allowed}")
    runtime.check_batch(config, few, args.devices // few)
    vocab_size = args.vocab_size or _vocab_size(config)
    if vocab_size < 2:
        raise UserError(f"--vocab_size is {vocab_size}; allowed: 2 or more")
    configure(config, device, few)

    from jaxlm.plan.planning import make_plan

    plan = make_plan(config, device, args.devices, vocab_size)
    summary = plan.summary()
    _print(plan)
    others = ["--devices", str(args.devices), "--device", args.device]
    if args.compare:
        if args.vocab_size:
            others += ["--vocab_size", str(args.vocab_size)]
        summary["compare"] = planned(["--config", args.compare, *others, *overrides])
        _show(_beside_table(args.config, args.compare, compared(summary, summary["compare"])))
    if not plan.fits:
        here = ["--config", args.config, *others, "--vocab_size", str(vocab_size), *overrides]
        summary["change"] = _show_change(cheapest_fit(here, config, args.devices))
    print(json.dumps(summary))
    return 0


def _vocab_size(config: Config) -> int:
    """The number of tokens, as far as the configuration says it."""
    d = config.data
    if d.source in ("synthetic", "tokens") or (d.tokenizer == "sentencepiece" and not d.tokenizer_path):
        return d.vocab_size
    if d.tokenizer == "bytes":
        return BYTES
    raise UserError(
        f"--vocab_size is missing; allowed: the number of tokens, unknown with data.tokenizer={d.tokenizer}"
    )


def _print(plan: "Plan") -> None:
    rows = plan.config.batch_size // plan.count
    _show(
        f"{plan.parameters / 1e6:.1f} M parameters on {plan.count} x {plan.device.name} ({plan.device.source}),"
        f" {rows} x {plan.config.seq_len} tokens a device and step"
    )
    if plan.device.chip is not None and not can_compile_for_gpus():
        _show(
            "this is a rough plan, from a program for CPUs, because JAX's CUDA plugin is not installed; `make plan-env`"
            " makes an environment that has it"
        )
    _show(_memory_table(plan))
    if plan.time.exchanges:
        _show(_exchange_table(plan))
    _show(_cost_table(plan))
    if len(plan.curve) > 1:
        _show(_curve_table(plan))
    steps, seconds = plan.config.steps, plan.time.seconds
    _show(
        f"a step takes {seconds * 1e3:.4g} ms, {plan.time.waiting * 1e3:.3g} of them waiting for other devices:"
        f" {plan.tokens / seconds:,.0f} tokens/s, {plan.mfu:.1%} of the devices' FLOP/s;"
        f" {steps:,} steps take {plan.hours:,.1f} hours"
        + (f" and at most {plan.kilowatt_hours:,.1f} kWh" if plan.device.watts else "")
    )


def _show(what: Any) -> None:
    from rich.console import Console

    Console(emoji=False, highlight=False, soft_wrap=True).print(what)


def _table(*columns: str) -> Any:
    from rich.table import Table

    return Table(*columns, box=None)


MEMORY = {"average": "moving average", "reduction": "state of the reduction", "kept": "kept for the backward pass"}


def _memory_table(plan: "Plan") -> Any:
    table = _table("memory of a device", "GB")
    for name, value in plan.memory._asdict().items():
        if value >= 5e5:
            table.add_row(MEMORY.get(name, name), f"{value / 1e9:.2f}")
    fits = "" if plan.fits else ": does not fit"
    table.add_row("all", f"{plan.memory.total / 1e9:.2f} of {plan.usable / 1e9:.1f}{fits}")
    return table


def _exchange_table(plan: "Plan") -> Any:
    """The ten collectives that take longest."""
    table = _table("collective", "where", "times", "MB", "ms each", "ms of kernels beside")
    for e in sorted(plan.time.exchanges, key=lambda e: -e.collective.times * e.seconds)[:10]:
        c = e.collective
        beside = f"{e.beside * 1e3:.3g} ({e.kernels})"
        table.add_row(c.kind, c.where, str(c.times), f"{c.bytes / 1e6:.4g}", f"{e.seconds * 1e3:.3g}", beside)
    return table


def _cost_table(plan: "Plan") -> Any:
    """The ten lines of code that take longest."""
    table = _table("largest costs", "ms a step", "GB", "TFLOP")
    for cost in plan.time.by_source()[:10]:
        numbers = cost.seconds * 1e3, cost.bytes / 1e9, cost.flops / 1e12
        table.add_row(cost.source or "elsewhere", *(f"{number:.3g}" for number in numbers))
    return table


def _curve_table(plan: "Plan") -> Any:
    table = _table("devices", "tokens/s", "of linear")
    for n, seconds in plan.curve:
        tokens = plan.tokens * n / plan.count  # each device has the same part of the batch
        table.add_row(str(n), f"{tokens / seconds:,.0f}", f"{plan.curve[0][1] / seconds:.0%}")
    return table


def _beside_table(a: str, b: str, rows: list[tuple[str, str, str, str]]) -> Any:
    table = _table("side by side", a, b, "ratio")
    for row in rows:
        table.add_row(*row)
    return table


def _show_change(found: tuple[tuple[str, ...], dict[str, Any]] | None) -> list[str] | None:
    """Prints the change that makes a run fit; returns its overrides."""
    if found is None:
        _show("neither more micro-batches nor recomputation nor a shared optimizer makes it fit: take a smaller model")
        return None
    change, plan = found
    _show(
        f"it fits with {' '.join(f'--config.{o}' for o in change)}: {plan['memory_bytes']['total'] / 1e9:.1f} GB on a"
        f" device, {plan['step_seconds'] * 1e3:.4g} ms a step"
    )
    return list(change)
