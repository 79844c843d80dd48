"""The parser of all command lines."""

import argparse
import os
import shutil
import sys
from collections.abc import Callable
from typing import Any, NoReturn


class Parser(argparse.ArgumentParser):
    """An argument parser that reports an error in one line, without the usage, and ends with exit code 2.

    Args:
      more: returns text to append to the help, for lines of a given width.
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
        except BrokenPipeError:  # `--help | head`: the interpreter flushes stdout once more when it ends
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

    def error(self, message: str) -> NoReturn:
        print(f"{self.prog}: {message}", file=sys.stderr)
        sys.exit(2)


def config_parser(prog: str, description: str | None) -> Parser:
    """The parser of a command that takes a configuration: `--config FILE`, and overrides as unknown arguments."""
    parser = Parser(
        prog=prog,
        description=description,
        allow_abbrev=False,
        epilog="--config.KEY=VALUE sets a key, as for training.",
    )
    parser.add_argument(
        "--config", required=True, metavar="FILE", help="a configuration: a name such as base, or a file"
    )
    return parser
