"""Says what a run would need, without running it: memory, time, communication, energy.

The training step is compiled for the devices, which need not be there, and the compiled program is read. Where JAX's
CUDA plugin is not installed, the program is one for CPUs, and only roughly what a GPU would run; `make plan-env` makes
an environment with the plugin. All numbers are planned, none is measured. The last line of output is one JSON object.
"""

import argparse
import contextlib
import importlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxlm.commands.plan_variants import cheapest_fit, compared, planned
from jaxlm.config import Config, UserError, cli, files
from jaxlm.config.paths import user_path
from jaxlm.host import runtime
from jaxlm.plan import devices as known
from jaxlm.plan.compiled import can_compile_for_gpus, compiled_devices, configure
from jaxlm.run.pages import check_path, print_table, print_text

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
    parser.add_argument(
        "--recommend",
        action="store_true",
        help="searches for the grid, ZeRO, micro-batches and recomputation with the shortest step on up to N devices,"
        " whatever the configuration says of them",
    )
    parser.add_argument("--html", type=Path, metavar="FILE", help="writes the plan as a page for a browser, too")
    args, overrides = parser.parse_known_args(argv)
    config = files.load(user_path("--config", args.config), overrides)
    if args.html:
        check_path("--html", args.html)
    if args.devices < 1:
        raise UserError(f"--devices is {args.devices}; allowed: 1 or more")
    device = known.find(args.device, args.devices)
    if args.recommend:
        for option in ("compare", "html"):
            if getattr(args, option):
                raise UserError(f"--{option} is {getattr(args, option)}; allowed: without --recommend")
        return _recommend(args, config, device, overrides)
    few = min(args.devices, device.per_host)
    if args.devices % few:
        allowed = f"up to {few}, the devices of a host, or a multiple of {few}"
        raise UserError(f"--devices is {args.devices}; allowed with --device {args.device}: {allowed}")
    runtime.check_batch(config, few, args.devices // few)
    vocab_size = _vocab_size(args.vocab_size, config)
    configure(config, device, compiled_devices(config, device, args.devices))

    from jaxlm.commands.plan_tables import beside_table, write_plan
    from jaxlm.plan.planning import make_plan

    if device.chip is None:
        _import_as_a_run_does()
    plan = make_plan(config, device, args.devices, vocab_size)
    summary = plan.summary()
    _print(plan)
    others = ["--devices", str(args.devices), "--device", args.device]
    beside = None
    if args.compare:
        if args.vocab_size:
            others += ["--vocab_size", str(args.vocab_size)]
        summary["compare"] = planned(["--config", args.compare, *others, *overrides])
        beside = beside_table(args.config, args.compare, compared(summary, summary["compare"]))
        print_table(beside)
    if not plan.fits:
        here = ["--config", args.config, *others, "--vocab_size", str(vocab_size), *overrides]
        summary["change"] = _show_change(cheapest_fit(here, config, args.devices))
    if args.html:
        write_plan(args.html, plan, beside)
        print_text(f"wrote {args.html}")
    print(json.dumps(summary))
    return 0


def _recommend(args: argparse.Namespace, config: Config, device: known.Device, overrides: list[str]) -> int:
    from jaxlm.commands.plan_grids import recommend

    if config.model.encoder_layers:
        layers = config.model.encoder_layers
        raise UserError(f"model.encoder_layers is {layers}; allowed with --recommend: 0, a model of equal layers")
    vocab_size = _vocab_size(args.vocab_size, config)
    configure(config, device, 2)  # samples are compiled for one device, or two that share sequences
    own = [f"--config={args.config}", "--device", args.device, "--vocab_size", str(vocab_size), *overrides]
    print(json.dumps(recommend(own, config, device, args.devices, vocab_size)))
    return 0


def _vocab_size(given: int | None, config: Config) -> int:
    vocab_size = given or vocab_size_of(config)
    if vocab_size < 2:
        raise UserError(f"--vocab_size is {vocab_size}; allowed: 2 or more")
    return vocab_size


def _import_as_a_run_does() -> None:
    """Imports what a run imports, because on CPUs that takes a part of the same memory."""
    from jaxlm.data.tf_import import import_tensorflow

    importlib.import_module("jaxlm.run.training")
    with contextlib.suppress(Exception):  # a run does without TensorFlow where it is absent or broken
        import_tensorflow()


def vocab_size_of(config: Config) -> int:
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
    from jaxlm.commands.plan_tables import headline, result, tables

    print_text(headline(plan))
    if plan.device.chip is not None and not can_compile_for_gpus():
        print_text(
            "this is a rough plan, from a program for CPUs, because JAX's CUDA plugin is not installed; `make plan-env`"
            " makes an environment that has it"
        )
    for table in tables(plan):
        print_table(table)
    print_text(result(plan))


def _show_change(found: tuple[tuple[str, ...], dict[str, Any]] | None) -> list[str] | None:
    """Prints the change that makes a run fit; returns its overrides."""
    if found is None:
        print_text(
            "neither more micro-batches nor recomputation nor a shared optimizer makes it fit: take a smaller model"
        )
        return None
    change, plan = found
    print_text(
        f"it fits with {' '.join(f'--config.{o}' for o in change)}: {plan['memory_bytes']['total'] / 1e9:.1f} GB on a"
        f" device, {plan['step_seconds'] * 1e3:.4g} ms a step"
    )
    return list(change)
