"""Checks paths that users give, and finds the checkpoints of a workdir."""

import re
from pathlib import Path

from jaxlm.config import UserError, show


def user_path(name: str, text: str) -> Path:
    """The path that a user gave for the option or key `name`, with ~ expanded. It need not exist.

    Raises:
      UserError: no file can have this path.
    """
    if not text:
        raise UserError(f"{name} is ''; allowed: a path")
    try:
        path = Path(text).expanduser()
        path.exists()
    except (OSError, RuntimeError, ValueError) as error:  # the name is too long, ~USER is unknown, there is a NUL
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(f"{name} is {show(text)}: {reason}; allowed: a valid path") from error
    return path


def holds_checkpoints(workdir: Path) -> bool:
    """Whether a workdir has a saved step. A run that is killed before its first save leaves an empty folder."""
    return bool(steps_in(workdir / "checkpoints"))


def steps_in(folder: Path) -> list[int]:
    """The steps saved in a folder of checkpoints, ascending. Orbax names a checkpoint's folder so once it is whole."""
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    return sorted(int(name) for name in names if re.fullmatch(r"0|[1-9][0-9]{0,17}", name))
