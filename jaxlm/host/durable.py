"""Files that are on disk when a function returns, and never seen half-written."""

import errno
import os
import secrets
from pathlib import Path


def write_whole(path: Path, text: str) -> None:
    """Writes a file that is never seen half-written."""
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
    """A name in the same folder that nobody has."""
    return path.with_name(f".{path.name}.{secrets.token_hex(8)}")


def append(path: Path, content: bytes) -> None:
    """Adds all of it to a file, or nothing."""
    with open(path, "ab", buffering=0) as file:
        start = file.tell()
        try:
            if file.write(content) < len(content):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        except OSError:
            file.truncate(start)
            raise


def sync(path: Path) -> None:
    """Makes a file, or the names in a folder, durable."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if not (path.is_dir() and error.errno in (errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP)):
            raise  # some file systems know no such thing for folders
    finally:
        os.close(handle)
