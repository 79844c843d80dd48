"""How command lines are parsed, and how they refuse."""

import argparse
import os
import shutil
import sys
from collections.abc import Callable
from typing import Any, NoReturn


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
