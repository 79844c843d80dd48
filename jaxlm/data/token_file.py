"""Reads numbers from a file when they are needed.

The file is not mapped into memory: if a mapped file is cut short, or its network file system goes away, the system
kills the process with SIGBUS. A failed read instead raises an error that names the file.
"""

import os
import weakref
from pathlib import Path
from typing import Any

import numpy as np

from jaxlm.config import UserError


class TokenFile:
    """`length` numbers of a file from byte `offset` on, with the part of NumPy's array interface that `Tokens` uses."""

    def __init__(self, path: Path, dtype: np.dtype, offset: int, length: int, handle: int | None = None):
        """Opens the file; raises OSError if that fails.

        Args:
          handle: an open file descriptor of the same file, which the caller closes.
        """
        self.path, self.dtype, self.offset, self.size = path, np.dtype(dtype), offset, length
        self.itemsize, self.nbytes, self.ndim = self.dtype.itemsize, length * self.dtype.itemsize, 1
        if handle is None:
            handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            weakref.finalize(self, os.close, handle)
        self._handle = handle
        self._owner: TokenFile | None = None

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: slice) -> "TokenFile":
        """Returns a part of the file, without reading it."""
        start, stop, _ = index.indices(self.size)
        offset = self.offset + start * self.itemsize
        part = TokenFile(self.path, self.dtype, offset, max(0, stop - start), self._handle)
        part._owner = self._owner or self  # the owner keeps the file open
        return part

    def read(self, start: int, stop: int) -> np.ndarray:
        """Returns the numbers start ... stop - 1, fewer at the end of the file.

        Raises:
          UserError: the file cannot be read, or has become shorter since it was opened.
        """
        wanted, at = max(0, min(stop, self.size) - start) * self.itemsize, self.offset + start * self.itemsize
        try:
            found = os.pread(self._handle, wanted, at)
            while len(found) < wanted:  # the system reads at most 2 GB at a time
                more = os.pread(self._handle, wanted - len(found), at + len(found))
                if not more:
                    size, needed = os.fstat(self._handle).st_size, self.offset + self.nbytes
                    raise UserError(f"{self.path}: {size} bytes; allowed: {needed} or more, as when it was opened")
                found += more
        except OSError as error:
            raise UserError(f"{self.path}: can no longer be read ({error.strerror})") from error
        return np.frombuffer(found, self.dtype)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return self.read(0, self.size).astype(dtype or self.dtype, copy=bool(copy))


Shard = np.ndarray | TokenFile
