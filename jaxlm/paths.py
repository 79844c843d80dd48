"""Paths that users give."""

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
