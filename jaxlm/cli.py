"""Configurations from files, command lines and workdirs, checked as a whole; and how command lines refuse.

Nothing here imports jax.
"""

import argparse
import dataclasses
import difflib
import importlib.util
import json
import re
import sys
from pathlib import Path
from typing import Any, Literal, NoReturn, get_args, get_origin

from absl import flags
from ml_collections import config_flags

from jaxlm.config import BEFORE, Config, OwnFloat, UserError, describe, flatten, key_types, sections
from jaxlm.validate import validate

BASE = Path(__file__).parents[1] / "configs/base.py"


def _unknown_key(key: str, where: str) -> UserError:
    names = [f.name for f in sections()]
    if key in names:
        inside = ", ".join(k for k in key_types() if k.startswith(key + "."))
        return UserError(f"{where}: '{key}' is a section; its keys: {inside}")
    known = [*key_types(), *names]
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    if not near:  # the right name in the wrong section
        near = [k for k in known if k.rsplit(".", 1)[-1] == key.rsplit(".", 1)[-1]][:1]
    hint = f"; did you mean '{near[0]}'?" if near else f"; sections: {', '.join(names)}"
    return UserError(f"{where}: unknown key '{key}'{hint}")


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
            raise _unknown_key(prefix + extra[0], where)
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

    Those take the values with which a run does what it did before there was the key: those of configs/base.py, or of
    `config.BEFORE`.

    Raises:
      UserError: a key is unknown or of the wrong type, or a section is missing.
    """
    gained = {}
    for key in key_types() if BASE.is_file() else ():
        *section, name = key.split(".")
        holder = tree.get(section[0]) if section else tree
        if isinstance(holder, dict) and name not in holder:
            gained[key] = holder[name] = BEFORE.get(key, flatten(_load_file(BASE))[key])
    config = from_dict(tree, where)
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


def _load_file(path: Path) -> Config:
    """What a configuration file's `get_config()` gives, or that of a run, from its config.json."""
    if not path.is_file():
        raise UserError(f"--config {path}: no such file")
    if path.suffix == ".json":
        return from_saved(read_saved(path)["config"], str(path))[0]
    spec = importlib.util.spec_from_file_location("jaxlm_user_config", path)
    if spec is None or spec.loader is None:
        raise UserError(f"--config {path}: allowed: a Python file (.py), or the config.json of a run")
    module = importlib.util.module_from_spec(spec)
    # `from configs import base` works from any folder: the repository's root comes first, then the user's.
    roots = [str(Path(__file__).resolve().parents[1]), str(path.resolve().parents[1])]
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
            raise _unknown_key(prefixes.get(typo[1], "") + typo[2], f"--config {path}") from error
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
    types = key_types()
    for argument in overrides:
        if re.match(r"--?(flagfile|undefok)\b", argument):  # absl's own: more options from a file, and fewer errors
            raise UserError(f"{argument.split('=')[0]}: unknown option; see --help")
        if re.match(r"-(no)?config\b", argument):
            raise UserError(f"{argument.split('=')[0]}: unknown option; allowed: --config.KEY=VALUE, with two dashes")
        if not argument.startswith("--") or argument == "--":
            continue  # the value of `--config.key value`; a stray one is reported below
        key = argument.split("=")[0].removeprefix("--no").removeprefix("--").removeprefix("config.")
        if not re.match(r"--(no)?config\.", argument):
            raise UserError(f"{argument.split('=')[0]}: unknown option; see --help")
        if key not in types:
            raise _unknown_key(key, "command line")
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
        raise UserError(f"{found[1]} is '{found[2]}'; allowed: {describe(types[found[1]])}") from error
    except flags.Error as error:
        raise UserError(f"command line: {' '.join(str(error).split())}") from error
    except RecursionError as error:  # absl looks for a name like it
        raise UserError("command line: an unknown option with a very long name; see --help") from error
    if len(rest) > 1:
        raise UserError(f"command line: stray argument '{rest[1]}'; allowed: --config.KEY=VALUE")
    return validate(values.config)  # a copy with the overrides set


class _OwnFloatParser(flags.FloatParser):
    """A number, or `none` for the optimizer's own."""

    def parse(self, argument: Any) -> Any:
        return None if str(argument).lower() == "none" else super().parse(argument)


def load(path: str | Path, overrides: list[str] | None = None) -> Config:
    """The checked configuration of a file with command-line overrides."""
    return apply_overrides(_load_file(Path(path)), overrides or [])


def load_workdir(workdir: str | Path, overrides: list[str] | None = None) -> Config:
    """The configuration that a run saved in its workdir, with command-line overrides."""
    path = Path(workdir) / "config.json"
    if not path.exists():
        raise UserError(f"--workdir {workdir}: no config.json there; allowed: the workdir of a run")
    return apply_overrides(from_saved(read_saved(path)["config"], str(path))[0], overrides or [])


class Parser(argparse.ArgumentParser):
    """argparse whose errors are one line and exit code 2."""

    def error(self, message: str) -> NoReturn:
        print(f"{self.prog}: {message}", file=sys.stderr)
        sys.exit(2)
