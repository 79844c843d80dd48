"""Configurations from command lines, files and workdirs, checked as a whole; and how command lines refuse.

Nothing here imports jax.
"""

import argparse
import os
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NoReturn, get_args, get_origin

from absl import flags
from ml_collections import config_flags

from jaxlm.config import Config, OwnFloat, UserError, describe, flatten, key_types, show
from jaxlm.config.files import check_vocab_size, from_saved, load_file, read_config, read_saved
from jaxlm.config.hints import unknown_key, unknown_option
from jaxlm.config.paths import holds_checkpoints
from jaxlm.config.pretrained import brought_by, check_asked, keys_of, named_weights, updated, with_own_tokenizer
from jaxlm.config.validate import check_address, validate


def apply_overrides(config: Config, overrides: list[str]) -> Config:
    """`['--config.optim.lr=3e-4', '--config.model.remat', 'full']` set on the configuration, then checked.

    Raises:
      UserError: an argument is not an override, its key is unknown, or its value has the wrong type.
    """
    return validate(_set(config, overrides))


def _set(config: Config, overrides: list[str]) -> Config:
    """A copy of the configuration with the overrides set."""
    types = key_types()
    for argument in overrides:
        if re.match(r"--?(flagfile|undefok)\b", argument):  # absl's own: more options from a file, and fewer errors
            raise UserError(f"{argument.split('=')[0]}: unknown option; see --help")
        if re.match(r"-(no)?config\b", argument):
            raise UserError(f"{argument.split('=')[0]}: unknown option; allowed: --config.KEY=VALUE, with two dashes")
        if not argument.startswith("--") or argument == "--":
            continue  # the value of `--config.key value`; a stray one is reported below
        key = _key(argument)
        if not re.match(r"--(no)?config\.", argument):
            raise unknown_option(argument.split("=")[0])
        if key not in types:
            raise unknown_key(key, "command line")
        if argument.startswith("--no") and "=" in argument:
            raise UserError(f"{argument}: takes no value; allowed: --noconfig.{key} or --config.{key}=VALUE")
    for kind in {k for k in types.values() if get_origin(k) is Literal}:
        config_flags.register_flag_parser_for_type(kind, flags.EnumParser([str(v) for v in get_args(kind)]))
    config_flags.register_flag_parser_for_type(OwnFloat, _OwnFloatParser())
    values = flags.FlagValues()
    argv = ["jaxlm", *overrides]
    config_flags.DEFINE_config_dataclass("config", config, flag_values=values, sys_argv=argv)
    try:
        rest = values(argv)
    except flags.IllegalFlagValueError as error:
        found = re.match(r"flag --config\.([\w.]+)=(.*?): ", str(error), re.DOTALL)
        if not found:
            raise UserError(f"command line: {error}") from error
        raise UserError(f"{found[1]} is {show(found[2])}; allowed: {describe(types[found[1]])}") from error
    except flags.Error as error:
        raise UserError(f"command line: {' '.join(str(error).split())}") from error
    except RecursionError as error:  # absl looks for a name like it
        raise UserError("command line: an unknown option with a very long name; see --help") from error
    if len(rest) > 1:
        raise UserError(f"command line: stray argument '{rest[1]}'; allowed: --config.KEY=VALUE")
    return values.config


class _OwnFloatParser(flags.FloatParser):
    """Reads a number, or `none` for the optimizer's own."""

    def parse(self, argument: Any) -> Any:
        return None if str(argument).lower() == "none" else super().parse(argument)


def _key(argument: str) -> str:
    return argument.split("=")[0].removeprefix("--no").removeprefix("--").removeprefix("config.")


def load(path: str | Path, overrides: list[str] | None = None, workdir: Path | None = None) -> Config:
    """The checked configuration of a file with command-line overrides.

    With weights of another run (`checkpoint.resume`), the model's keys and the tokenizer are that run's, whatever the
    file says; a line on stderr says which. A run that goes on in `workdir` takes them from there.

    Raises:
      UserError: an override contradicts the weights, or what `apply_overrides` raises.
    """
    file, overrides = load_file(Path(path)), overrides or []
    config = _set(file, overrides)
    check_address("checkpoint.resume", config.checkpoint.resume)  # before a message shows it
    weights = named_weights(config.checkpoint.resume)
    if weights is None:
        return validate(config)
    if workdir is not None and holds_checkpoints(workdir) and (workdir / "config.json").exists():
        return validate(_set(updated(file, keys_of(load_file(workdir / "config.json"))), overrides))
    run, brought = _weights_of(weights.workdir, config.checkpoint.resume)
    asked = {_key(argument) for argument in overrides if argument.startswith("--")}
    check_asked(config, brought, asked, run, weights.workdir)
    before, config = flatten(config), validate(_set(updated(file, brought), overrides))
    said = {k: v for k, v in flatten(config).items() if k in brought and v != before[k] and not k.startswith("data.")}
    if said:
        shown = ", ".join(f"{k}={v} (not {before[k]})" for k, v in said.items())
        print(f"checkpoint.resume: {shown}, as in {weights.workdir}", file=sys.stderr)
    return config


def _weights_of(workdir: Path, resume: str) -> tuple[Config, dict[str, Any]]:
    """The configuration of a run, and the keys that its weights bring."""
    path = workdir / "config.json"
    if not path.is_file():
        raise UserError(
            f"checkpoint.resume is '{resume}': no config.json in {workdir}; allowed: auto, never, or the "
            "workdir of a run, after which @STEP or @best may name a checkpoint"
        )
    saved = read_saved(path)
    check_vocab_size(saved, path)
    run = from_saved(saved["config"], str(path))[0]
    return run, brought_by(workdir, run, saved["vocab_size"])


def load_workdir(workdir: str | Path, overrides: list[str] | None = None) -> Config:
    """The configuration that a run saved in its workdir, with command-line overrides."""
    path = Path(workdir) / "config.json"
    if not path.exists():
        raise UserError(f"--workdir {workdir}: no config.json there; allowed: the workdir of a run")
    config = with_own_tokenizer(read_config(path)[0], path.parent)
    return apply_overrides(config, overrides or [])


class Parser(argparse.ArgumentParser):
    """argparse whose errors are one line and exit code 2.

    Args:
      more: gives the rest of the help, from the width of the terminal.
    """

    def __init__(self, *args: Any, more: Callable[[int], str] | None = None, **keys: Any):
        super().__init__(*args, **keys)
        self._more = more

    def format_help(self) -> str:
        text = super().format_help()
        return f"{text}\n{self._more(shutil.get_terminal_size().columns - 2)}" if self._more else text

    def print_help(self, file: Any = None) -> None:
        try:
            super().print_help(file)
            sys.stdout.flush()
        except BrokenPipeError:  # `--help | head`: nothing is left for the interpreter to write at its end
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

    def error(self, message: str) -> NoReturn:
        print(f"{self.prog}: {message}", file=sys.stderr)
        sys.exit(2)
