"""Shows the model of a configuration or of a run: its parts with their shapes, parameters and FLOPs.

    jaxlm show base
    jaxlm show runs/base

Of a run, it also shows the checkpoints with their validation scores, and the last metrics. No weights are made or read.
"""

import functools
from pathlib import Path
from typing import Any

from jaxlm.checkpoint import metrics_file, workdirs
from jaxlm.commands.plan import vocab_size_of
from jaxlm.config import Config, UserError, cli, files, show
from jaxlm.config.paths import steps_in, user_path
from jaxlm.run.pages import Table, print_table

UNITS = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def main(argv: list[str]) -> int:
    parser = cli.Parser(
        prog="jaxlm show",
        description=__doc__,
        allow_abbrev=False,
        epilog="--config.KEY=VALUE sets a key of a configuration, as for training.",
    )
    parser.add_argument("what", metavar="CONFIG|WORKDIR", help="a configuration's name or file, or the folder of a run")
    parser.add_argument(
        "--vocab_size", type=int, metavar="V", help="number of tokens, where the configuration does not say it"
    )
    args, overrides = parser.parse_known_args(argv)
    path = user_path("CONFIG|WORKDIR", args.what)
    if path.is_dir():
        _show_run(path, [*overrides, *(["--vocab_size"] if args.vocab_size is not None else [])])
        return 0
    config = files.load(path, overrides)
    vocab_size = vocab_size_of(config) if args.vocab_size is None else args.vocab_size
    if vocab_size < 2:
        raise UserError(f"--vocab_size is {vocab_size}; allowed: 2 or more")
    _show_model(config, vocab_size)
    return 0


def _show_run(workdir: Path, options: list[str]) -> None:
    if not (workdir / "config.json").is_file():
        raise UserError(
            f"CONFIG|WORKDIR is {show(str(workdir))}: no config.json there; allowed: a configuration, or the workdir of"
            " a run"
        )
    if options:
        raise UserError(f"{options[0]} is given with a run; allowed: with a configuration, for a run has its own")
    config, facts = files.read_config(workdir / "config.json")[0], workdirs.read_facts(workdir)
    checkpoints, last = _checkpoints(workdir), _last_metrics(workdir)  # before anything is printed: they may be damaged
    _show_model(config, facts["vocab_size"])
    for table in (checkpoints, last):
        if table.rows:
            print()
            print_table(table)


def _show_model(config: Config, vocab_size: int) -> None:
    import jax

    from jaxlm.model import make_model, num_params
    from jaxlm.train import trained

    jax.config.update("jax_platforms", "cpu")  # nothing is computed, so no GPU is taken
    model = make_model(config.model, vocab_size, config.seq_len, "cpu")
    params = model.shapes()
    flops = trained.flops_per_token(config, params)
    print_table(model_table(config, params))
    tokens = config.steps * config.batch_size * config.seq_len
    own = num_params(trained.part(config, params))
    of_them = f", {_short(own)} of them trained" if own < num_params(params) else ""
    print(
        f"{_short(num_params(params))} parameters{of_them};"
        f" {_short(flops)}FLOPs a training token, forward and backward;"
        f" {config.steps:,} steps of {config.batch_size:,} x {config.seq_len:,} tokens: {flops * tokens:.3g} FLOPs"
    )


def model_table(config: Config, params: Any) -> Table:
    """A row for each array of the parameters, and one for attention's own products. FLOPs are of a training token; they
    add up to `flops_per_token`.
    """
    import jax

    from jaxlm.model import attention_flops, multiplied
    from jaxlm.train import trained

    rows = []
    for path, array in jax.tree_util.tree_flatten_with_path(params)[0]:
        name = "/".join(str(key.key) for key in path)
        frozen = not trained.trains(config, name)
        alone = functools.reduce(lambda tree, key: {key.key: tree}, reversed(path), array)
        flops = (4 if frozen else 6) * multiplied(config.model, alone, config.seq_len)
        rows.append((name + " (frozen)" * frozen, array.shape, array.size, flops))
    window = f", with windows of {config.model.window:,}" * bool(config.model.window)
    prompts = f" and {config.model.encoder_len:,} of prompts" * bool(config.model.encoder_layers)
    attention = attention_flops(config.model, config.seq_len)
    rows.append((f"attention to {config.seq_len:,} tokens{prompts}{window}", (), 0, attention))
    total = sum(row[3] for row in rows)
    shown = [
        (name, " x ".join(map(str, shape)), f"{size:,}" * bool(size), _short(flops), f"{flops / total:.1%}")
        for name, shape, size, flops in rows
    ]
    return Table("Model", ("part", "shape", "parameters", "FLOPs a token", "of all"), shown)


def _checkpoints(workdir: Path) -> Table:
    """The newest first."""
    scores = metrics_file.evaluations(workdir)
    steps = steps_in(workdir / "checkpoints")
    scored = [step for step in steps if step in scores]
    best = min(scored, key=lambda step: scores[step]["eval_loss"], default=None)
    rows = []
    for step in reversed(steps):
        m = scores.get(step, {})
        bits = m.get("eval_bits_per_byte")
        loss = f"{m['eval_loss']:.4f}" + " (best)" * (step == best) if m else "–"
        rows.append((f"{step:,}", loss, "–" if bits is None else f"{bits:.4f}"))
    return Table("Checkpoints", ("checkpoint of step", "validation loss", "bits per byte"), rows)


def _last_metrics(workdir: Path) -> Table:
    last: dict[str, Any] = {}
    for m in metrics_file.stream(workdir):
        if "eval_loss" not in m:
            last = m
    rows = [(key, _number(value)) for key, value in last.items() if key != "time"]
    return Table("Last metrics", ("last metrics", ""), rows)


def _number(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, list):
        return " ".join(_number(x) for x in value)
    return f"{value:,}" if isinstance(value, int) else "–" if value is None else show(value)


def _short(number: float) -> str:
    """12.3 k, 4.56 M, 7.89 G; with a space at its end if it has no unit"""
    unit, name = next(((unit, name) for unit, name in UNITS if number >= unit), (1, ""))
    return f"{number / unit:.3g} {name}"
