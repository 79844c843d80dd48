"""Sets keys from a command line: `--config.optim.lr=3e-4`."""

import re
from typing import Any, Literal, get_args, get_origin

from absl import flags
from ml_collections import config_flags

from jaxlm.config import Config, OwnFloat, UserError, describe, key_types, show
from jaxlm.config.hints import unknown_key, unknown_option
from jaxlm.config.validate import validate


def apply_overrides(config: Config, overrides: list[str]) -> Config:
    """Returns a checked copy of the configuration with overrides such as `['--config.optim.lr=3e-4']` set.

    A value may also be an argument of its own: `['--config.model.remat', 'full']`.

    Raises:
      UserError: an argument is not an override, its key is unknown, or a value is wrong.
    """
    return validate(with_overrides(config, overrides))


def with_overrides(config: Config, overrides: list[str]) -> Config:
    """Returns a copy of the configuration with the overrides set, like `apply_overrides` but without `validate`."""
    types = key_types()
    for argument in overrides:
        if re.match(r"--?(flagfile|undefok)\b", argument):  # absl's own: read options from a file, ignore unknown ones
            raise UserError(f"{argument.split('=')[0]}: unknown option; see --help")
        if re.match(r"-(no)?config\b", argument):
            raise UserError(f"{argument.split('=')[0]}: unknown option; allowed: --config.KEY=VALUE, with two dashes")
        if not argument.startswith("--") or argument == "--":
            continue  # the value of `--config.key value`; a stray argument is reported below
        key = key_of(argument)
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
    except RecursionError as error:  # from absl's search for a similar name
        raise UserError("command line: an unknown option with a very long name; see --help") from error
    if len(rest) > 1:
        raise UserError(f"command line: stray argument '{rest[1]}'; allowed: --config.KEY=VALUE")
    return values.config


class _OwnFloatParser(flags.FloatParser):
    """Reads a number, or `none` for the optimizer's own value."""

    def parse(self, argument: Any) -> Any:
        return None if str(argument).lower() == "none" else super().parse(argument)


def key_of(argument: str) -> str:
    """The key that an argument sets: `optim.lr` of `--config.optim.lr=1`, `log.wandb` of `--noconfig.log.wandb`."""
    return argument.split("=")[0].removeprefix("--no").removeprefix("--").removeprefix("config.")
