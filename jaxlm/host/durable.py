"""Writes files so that they are never seen half-written, and so that they survive a loss of power."""

import errno
import os
import secrets
from pathlib import Path


def write_whole(path: Path, text: str) -> None:
    """Writes or replaces a file. Readers see the old content or the new one; on return the new one is on disk."""
    temporary = beside(path)
    try:
        with open(temporary, "x", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def beside(path: Path) -> Path:
    """An unused path in the same folder, with a hidden name that contains the file's."""
    return path.with_name(f".{path.name}.{secrets.token_hex(8)}")


def append(path: Path, content: bytes) -> None:
    """Appends all of the content to a file, or leaves the file as it is and raises OSError. Does not sync."""
    with open(path, "ab", buffering=0) as file:
        start = file.tell()
        try:
            if file.write(content) < len(content):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        except OSError:
            file.truncate(start)
            raise


def sync(path: Path) -> None:
    """Flushes a file's content, or a folder's entries, to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if not (path.is_dir() and error.errno in (errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP)):
            raise  # some file systems cannot sync folders
    finally:
        os.close(handle)
