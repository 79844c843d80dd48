"""A new folder that is written whole or not at all."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from jaxlm.config import UserError
from jaxlm.host.durable import beside


def check_new(argument: str, path: Path) -> None:
    """Raises UserError unless a folder can be made there, before the work that fills it."""
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise UserError(f"{argument} is {path}, which is there already; allowed: a new or empty folder")
    if not path.absolute().parent.is_dir():
        raise UserError(f"{argument} is {path}; allowed: a new folder in one that exists")


@contextmanager
def whole_folder(argument: str, path: Path) -> Iterator[Path]:
    """Yields a path beside `path`, where the folder is made. It gets its name at the end; after an error it is removed.

    Raises:
      UserError: it cannot be written.
    """
    temporary = beside(path.absolute())
    try:
        yield temporary
        if path.exists():
            path.rmdir()
        temporary.rename(path)
    except OSError as error:
        raise UserError(f"{argument} is {path}: {error.strerror or error}; allowed: a folder to write in") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
