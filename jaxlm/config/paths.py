"""Paths that users give, and what is there."""

import re
from pathlib import Path

from jaxlm.config import UserError, show


def user_path(name: str, text: str) -> Path:
    """The path that a user gave for `name`.

    Raises:
      UserError: no file could ever be there.
    """
    if not text:
        raise UserError(f"{name} is ''; allowed: a path")
    try:
        path = Path(text).expanduser()
        path.exists()
    except (OSError, RuntimeError, ValueError) as error:  # a name too long, a home of nobody, a NUL
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(f"{name} is {show(text)}: {reason}; allowed: a path that can be") from error
    return path


def holds_checkpoints(workdir: Path) -> bool:
    """Whether a step was saved; a run that was killed before its first save leaves an empty folder."""
    return bool(steps_in(workdir / "checkpoints"))


def steps_in(folder: Path) -> list[int]:
    """The steps that were saved in a folder of checkpoints: Orbax gives one its name when it is whole."""
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    return sorted(int(name) for name in names if re.fullmatch(r"0|[1-9][0-9]{0,17}", name))
