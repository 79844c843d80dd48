"""Temporary folders that are removed even if a signal ends the program."""

import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from jaxlm.host import signals


@contextlib.contextmanager
def temporary_folder() -> Iterator[Path]:
    """Creates an empty folder, and removes it when the context ends, or when a signal ends the program."""
    folder = Path(tempfile.mkdtemp(prefix="jaxlm-"))

    def remove() -> None:
        """Renames the folder, so that threads that still write to it no longer find it, and then removes it."""
        hidden = folder.with_name(f"{folder.name}.removed")
        folder.rename(hidden)
        shutil.rmtree(hidden, ignore_errors=True)

    signals.at_stop(remove)
    try:
        yield folder
    finally:
        signals.forget(remove)
        shutil.rmtree(folder, ignore_errors=True)
