"""Configurations from files, command lines and workdirs, checked as a whole; and how command lines refuse.

Nothing here imports jax.
"""

import argparse
import dataclasses
import importlib.util
import json
import os
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NoReturn, get_args, get_origin

from absl import flags
from ml_collections import config_flags

from jaxlm.config import BEFORE, MAX_INT, Config, OwnFloat, UserError, describe, flatten, key_types, sections, show
from jaxlm.config.hints import unknown_key, unknown_option
from jaxlm.config.paths import holds_checkpoints
from jaxlm.config.pretrained import brought_by, check_asked, keys_of, named_weights, updated, with_own_tokenizer
from jaxlm.config.validate import check_address, validate

BASE = Path(__file__).parents[2] / "configs/base.py"


def from_dict(tree: dict[str, Any], where: str = "config.json") -> Config:
    """The configuration that `dataclasses.asdict` gave, checked.

    Raises:
      UserError: a key is unknown, missing, or of the wrong type.
    """

    def build(cls: Any, sub: Any, prefix: str) -> Any:
        names: dict[str, Any] = {f.name: f.type for f in dataclasses.fields(cls)}
        if not isinstance(sub, dict):
            raise UserError(f"{where}: '{prefix.rstrip('.')}' is {sub!r}; allowed: an object of keys")
        if extra := sorted(set(sub) - set(names)):
            raise unknown_key(prefix + extra[0], where)
        if missing := sorted(set(names) - set(sub)):
            raise UserError(f"{where}: key '{prefix}{missing[0]}' is missing")
        return cls(
            **{
                n: build(t, sub[n], f"{prefix}{n}.") if dataclasses.is_dataclass(t) else sub[n]
                for n, t in names.items()
            }
        )

    return validate(build(Config, tree, ""))


def from_saved(tree: dict[str, Any], where: str) -> tuple[Config, dict[str, Any]]:
    """The configuration in a workdir, and the keys that jaxlm has gained since it was saved.

    A new key takes the value with which the run goes on as before: that of `config.BEFORE`, else of configs/base.py.

    Raises:
      UserError: a key is unknown or of the wrong type, or a section is missing.
    """
    gained = {}
    for key in key_types() if BASE.is_file() else ():
        *section, name = key.split(".")
        holder = tree.get(section[0]) if section else tree
        if isinstance(holder, dict) and name not in holder:
            gained[key] = holder[name] = BEFORE.get(key, flatten(_load_file(BASE))[key])
    try:
        config = from_dict(tree, where)
    except UserError as error:
        raise UserError(str(error) if where in str(error) else f"{where}: {error}") from error
    return config, {key: flatten(config)[key] for key in gained}


def read_saved(path: Path) -> dict[str, Any]:
    """What a workdir's config.json holds.

    Raises:
      UserError: it cannot be read, or is something else.
    """
    try:
        saved = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: unreadable ({error}); allowed: the config.json of a run") from error
    if not isinstance(saved, dict) or not isinstance(saved.get("config"), dict):
        raise UserError(f"{path}: not the configuration of a run (no 'config' in it)")
    return saved


def read_config(path: Path) -> tuple[Config, dict[str, Any]]:
    """`from_saved` of a workdir's config.json."""
    return from_saved(read_saved(path)["config"], str(path))


def _load_file(path: Path) -> Config:
    """The configuration that a file's `get_config()` returns, or that a run's config.json holds."""
    if not path.is_file():
        raise UserError(f"--config {path}: no such file")
    if path.suffix == ".json":
        return read_config(path)[0]
    spec = importlib.util.spec_from_file_location("jaxlm_user_config", path)
    if spec is None or spec.loader is None:
        raise UserError(f"--config {path}: allowed: a Python file (.py), or the config.json of a run")
    module = importlib.util.module_from_spec(spec)
    # `from configs import base` works from any folder: the repository's root comes first, then the user's.
    roots = [str(Path(__file__).resolve().parents[2]), str(path.resolve().parents[1])]
    sys.path[:0] = roots
    try:
        spec.loader.exec_module(module)
        config = module.get_config()
    except UserError:
        raise
    except (Exception, SystemExit) as error:  # any error of the user's own code
        typo = re.fullmatch(r"'(\w+)' object has no attribute '(\w+)'.*", str(error))
        if isinstance(error, AttributeError) and typo:
            prefixes = {f.type.__name__: f"{f.name}." for f in sections()}
            raise unknown_key(prefixes.get(typo[1], "") + typo[2], f"--config {path}") from error
        raise UserError(f"--config {path}: {type(error).__name__}: {error}") from error
    finally:
        for root in roots:
            sys.path.remove(root)
    if not isinstance(config, Config):
        raise UserError(f"--config {path}: get_config() returned {type(config).__name__}; allowed: jaxlm.config.Config")
    for field in sections():
        if not isinstance(section := getattr(config, field.name), field.type):
            raise UserError(
                f"--config {path}: {field.name} is {section!r}; allowed: jaxlm.config.{field.type.__name__}"
            )
    return config


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
    file, overrides = _load_file(Path(path)), overrides or []
    config = _set(file, overrides)
    check_address("checkpoint.resume", config.checkpoint.resume)  # before a message shows it
    weights = named_weights(config.checkpoint.resume)
    if weights is None:
        return validate(config)
    if workdir is not None and holds_checkpoints(workdir) and (workdir / "config.json").exists():
        return validate(_set(updated(file, keys_of(_load_file(workdir / "config.json"))), overrides))
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
        raise UserError(f"checkpoint.resume is '{resume}'; allowed: auto, never, or the workdir of a run, after which "
                        "@STEP or @best may name a checkpoint")  # fmt: skip
    saved = read_saved(path)
    check_vocab_size(saved, path)
    run = from_saved(saved["config"], str(path))[0]
    return run, brought_by(workdir, run, saved["vocab_size"])


def check_vocab_size(saved: dict[str, Any], path: Path) -> None:
    """Raises UserError if the content of a config.json has no possible vocab_size."""
    found = saved.get("vocab_size")
    if type(found) is not int or not 1 <= found <= MAX_INT:
        raise UserError(f"{path}: vocab_size is {show(found)}; allowed: what a run wrote there")


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
