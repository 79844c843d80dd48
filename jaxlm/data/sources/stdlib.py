"""The source `stdlib`: the code of Python's standard library, a corpus that every machine has."""

import sysconfig
from pathlib import Path

from jaxlm.config import DataConfig, UserError
from jaxlm.data.sources.documents import Source
from jaxlm.data.sources.text import by_name

SKIPPED_FOLDERS = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}


def open_stdlib(data: DataConfig) -> Source:
    """The .py files of the standard library, without its tests; each is a document.

    Raises:
      UserError: this Python has no .py files of its standard library.
    """
    return by_name(data, *python_files())


def python_files() -> tuple[dict[str, Path], int]:
    """The .py files of the standard library by their names, without its tests, and how many are unreadable.

    Raises:
      UserError: there are none.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    paths = {path.relative_to(root).as_posix(): path for path in root.rglob("*.py")}
    paths = {name: paths[name] for name in sorted(paths) if not SKIPPED_FOLDERS.intersection(name.split("/")[:-1])}
    files, skipped = {}, 0
    for name, path in paths.items():
        try:
            if path.read_bytes().decode():
                files[name] = path
        except (UnicodeDecodeError, OSError):  # OSError: a broken link, for example
            skipped += 1
    if not files:
        raise UserError(f"data.source: {root} holds no .py files of Python's standard library; allowed: another source")
    return files, skipped
