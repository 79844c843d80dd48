"""Temporary folders that a signal does not leave behind."""

import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from jaxlm.host import signals


@contextlib.contextmanager
def temporary_folder() -> Iterator[Path]:
    """An empty folder, which is removed at the end, also where a signal ends the program."""
    folder = Path(tempfile.mkdtemp(prefix="jaxlm-"))

    def remove() -> None:
        """Other threads may still write to the folder, so it is renamed first: they no longer find it."""
        hidden = folder.with_name(f"{folder.name}.removed")
        folder.rename(hidden)
        shutil.rmtree(hidden, ignore_errors=True)

    signals.at_stop(remove)
    try:
        yield folder
    finally:
        signals.forget(remove)
        shutil.rmtree(folder, ignore_errors=True)
