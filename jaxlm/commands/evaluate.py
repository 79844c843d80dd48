"""Scores a checkpoint on its whole validation set, on other data, or on tasks of lm-evaluation-harness. The last line
of output is one JSON object.
"""

import json
import os
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxlm.commands import evaluate_tasks
from jaxlm.config import SOURCES, Config, DataConfig, UserError, cli, files, flatten, mixture, show
from jaxlm.config.overrides import apply_overrides
from jaxlm.config.paths import user_path
from jaxlm.config.pretrained import read_step
from jaxlm.host import runtime
from jaxlm.host.durable import write_whole

if TYPE_CHECKING:
    from jaxlm.run.open_run import Run


def load(workdir: Path, overrides: list[str]) -> Config:
    """Returns the run's configuration with the given keys changed.

    Other data replaces the run's. All of `data.val_path` is scored, and nothing else is read; of `data.path` alone, the
    held-out part is scored.
    """
    config = files.load_workdir(workdir)
    asked = {k for k in ("path", "val_path") if any(re.match(rf"--config\.data\.{k}(=|$)", a) for a in overrides)}
    if asked:
        if config.data.mixture and not any(a.startswith("--config.data.source") for a in overrides):
            config.data.source = _source_of(config.data)
        config.data.mixture = config.data.val_path = ""
        config.data.path = "-"  # passes the checks until it is replaced or, with data.val_path alone, removed
        if (workdir / "tokenizer").is_dir():
            config.data.tokenizer_path = str(workdir / "tokenizer")
    config = apply_overrides(config, overrides)
    if asked == {"val_path"} and not config.data.val_path:
        raise UserError("data.val_path is ''; allowed: a file or a folder")
    if config.data.val_path and "val_path" in asked:
        config.data.path = ""
    elif "path" in asked and config.data.path:
        print(
            f"scores the held-out part of data.path={config.data.path}; --config.data.val_path scores all of it",
            file=sys.stderr,
        )
    return config


def _source_of(data: DataConfig) -> Any:
    """Returns the source of the files in a mixture, if it is the same for all."""
    names = [name for name, kind in SOURCES.items() if kind.files]
    kinds = sorted({part.source for _, part in mixture(data)} & {*names})
    if len(kinds) != 1:
        raise UserError(
            f"data.source is not given; allowed with data other than the run's mixture ({data.mixture}): "
            f"{', '.join(names)}"
        )
    return kinds[0]


def main(argv: list[str]) -> int:
    parser = cli.Parser(
        prog="jaxlm evaluate",
        description=__doc__,
        allow_abbrev=False,
        epilog="--config.data.val_path=FILE scores all of a file or folder; --config.data.path=FILE scores the part"
        " that data.val_fraction holds out. Both use the run's tokenizer; data.source names the kind of file.",
    )
    parser.add_argument("--workdir", required=True, help="the run, e.g. runs/base")
    parser.add_argument("--step", help="checkpoint to use: its step, or best by validation loss (default: the newest)")
    parser.add_argument(
        "--answers",
        metavar="FILE",
        help="with an encoder: write the most probable answer to each prompt of the validation set, with the expected"
        " one, as JSON lines into a new file; exact_match in the last line is the share of those that are equal",
    )
    evaluate_tasks.add_arguments(parser)
    args, overrides = parser.parse_known_args(argv)
    evaluate_tasks.check(args, overrides)
    workdir = user_path("--workdir", args.workdir)
    if args.tasks is not None:
        return evaluate_tasks.run(args, workdir)
    trained = flatten(files.load_workdir(workdir))
    config = load(workdir, overrides)
    lengths = ("seq_len", "model.encoder_len") if config.model.position == "rope" else ()
    free = ("data.", "parallel.", "batch_size", "loss.chunk", *lengths)
    for key, value in flatten(config).items():
        if value != trained[key] and not key.startswith(free):
            raise UserError(
                f"{key} is {value!r}; allowed: {trained[key]!r}, as in the run; only data.*, parallel.*, batch_size,"
                " loss.chunk and, with rope, seq_len and model.encoder_len can be set here"
            )
    if args.answers is not None:
        args.answers = user_path("--answers", args.answers)
        _check_answers(args.answers, config)
    config.eval.batches = 0
    runtime.check_batch(config, config.parallel.devices, 1)
    runtime.configure_jax(config, 1)

    from jaxlm.run.open_run import open_run, score

    run = open_run(workdir, read_step("--step", args.step))
    found = {"step": run.step, **score(run, config)}
    try:
        if args.answers is not None:
            found["exact_match"] = _write_answers(args.answers, run, config)
    finally:
        print(json.dumps(found))
    return 0


def _check_answers(path: Path, config: Config) -> None:
    if not config.model.encoder_layers:
        raise UserError("--answers: model.encoder_layers is 0; allowed: a run with an encoder, which answers prompts")
    _write(path, "")  # tells before the evaluation whether it can be written
    path.unlink()


def _write_answers(path: Path, run: "Run", config: Config) -> float:
    """Writes the answers, and returns the share of those that are as expected."""
    from jaxlm.run.answers import answers

    found = list(answers(run, config))
    lines = "".join(json.dumps(answer._asdict(), ensure_ascii=False) + "\n" for answer in found)
    _write(path, lines.encode("utf-8", "replace").decode())
    print(f"wrote {path}: {len(found):,} answers", file=sys.stderr)
    return sum(answer.answer == answer.expected for answer in found) / len(found)


def _write(path: Path, text: str) -> None:
    if os.path.lexists(path):
        raise UserError(f"--answers is {show(str(path))}, which is there; allowed: a new file")
    try:
        write_whole(path, text)
    except OSError as error:
        why = error.strerror or error
        raise UserError(f"--answers is {show(str(path))}: {why}; allowed: a new file in a writable folder") from error
