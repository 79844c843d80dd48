"""Paths that users give, and what is there."""

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
    folder = workdir / "checkpoints"
    return folder.is_dir() and any(path.name.isdigit() for path in folder.iterdir())
