"""Lists the files that a path names, reads them decompressed, and identifies their content.

`.gz`, `.bz2`, `.xz` and `.zst` files are decompressed while they are read; a truncated one is an error. A path may be
an address that fsspec knows (s3://, gs://, hf://, https://): it is then a UPath, which has the methods of a Path.
"""

import bz2
import gzip
import hashlib
import io
import lzma
import os
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, TypeVar, cast

from jaxlm.config import SOURCES, DataConfig, UserError
from jaxlm.config.paths import user_path

HASH_LIMIT = 1 << 30  # bytes; files that are larger together are identified by size and time, not by content
PACKED = (".gz", ".bz2", ".xz", ".zst")
XZ_MEMORY = 1 << 30  # bytes; a .xz file says how much its reader must allocate (`xz -9`: 65 MiB)
UNIT_BYTES, MAX_UNITS = 16 << 20, 256  # bytes of a unit; each becomes 2 open files, 4 with masks
LINE_BYTES = 1 << 20  # bytes searched for the end of a line where a file is cut

T = TypeVar("T")


def key_of(data: DataConfig) -> str:
    """The configuration key that names a source, as messages show it."""
    if data.mixture:
        return "a source of data.mixture"
    return f"data.{SOURCES[data.source].named_by}"


def is_alone(data: DataConfig) -> bool:
    """Whether the data is `data.val_path` alone, which can be scored; training needs `data.path` too."""
    return bool(data.val_path and not data.path)


def named(data: DataConfig) -> str:
    """A source's key and value, as messages show them."""
    if is_alone(data):
        return f"data.val_path={data.val_path}"
    if data.mixture:
        return f"data.mixture: {data.source} {name_of(data)}".rstrip()
    return f"{key_of(data)}={name_of(data) or data.source}"


def name_of(data: DataConfig) -> str:
    """The value of the key that names a source; "" if the kind of source needs no name."""
    key = SOURCES[data.source].named_by
    return "" if key == "source" else getattr(data, key)


def list_files(key: str, pattern: str, suffixes: tuple[str, ...] = ()) -> tuple[dict[str, Path], list[str]]:
    """Lists the files that `pattern` names: a file, a folder or a glob.

    In a folder, hidden files are left out, and if some files have one of the suffixes, so are all files without one.
    Empty files are left out everywhere.

    Returns:
      {name: path}, sorted by name. A name is the path relative to the folder, or to the glob's part before its first
      wildcard.
      The names of the files in a folder that are left out for being hidden or of another kind.

    Raises:
      UserError: there is no such path, or no usable file in it; names `key`.
    """
    path = located(key, pattern)
    plain = re.split(r"[*?[]", str(path))[0]
    root = path if plain == str(path) else located(key, plain if plain.endswith("/") else os.path.dirname(plain) or ".")
    try:
        if path.is_file():
            files = {path.name: path}
        elif path.is_dir():
            files = {p.relative_to(path).as_posix(): p for p in path.rglob("*") if p.is_file()}
        elif root is not path:
            files = {p.relative_to(root).as_posix(): p for p in _globbed(path, root) if p.is_file()}
        else:
            files = None
    except Exception as error:  # a remote store may raise anything
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise UserError(f"{key} is '{pattern}': cannot be listed ({' '.join(reason.split())})") from error
    if files is None:
        raise UserError(f"{key} is '{pattern}': no such file or folder; allowed: a file, a folder or a glob")
    if not files:
        raise UserError(f"{key} is '{pattern}': no files there; allowed: a file, a folder or a glob with files")
    kept = _of_kind(files, suffixes) if path.is_dir() else files
    if not kept:
        raise UserError(f"{key} is '{pattern}': nothing but hidden files; allowed: other files, or a glob")
    full = {name: path for name, path in _distinct(kept).items() if stat_of(path).st_size}
    if not full:
        raise UserError(f"{key} is '{pattern}': nothing but empty files; allowed: files with text")
    return full, sorted(files.keys() - kept.keys())


def _of_kind(files: dict[str, Path], suffixes: tuple[str, ...]) -> dict[str, Path]:
    """The files that are neither hidden nor in a hidden folder; only those with a suffix in `suffixes`, if any has."""
    seen = {name: path for name, path in files.items() if not re.search(r"(^|/)\.", name)}
    return {name: path for name, path in seen.items() if suffix_of(name) in suffixes} or seen


def stat_of(path: Path) -> os.stat_result:
    """The file's `os.stat_result`. Raises UserError if the file is gone or unreadable."""
    try:
        return path.stat()
    except OSError as error:
        raise UserError(f"{path}: unreadable ({error.strerror or error}); allowed: readable files") from error


def suffix_of(name: str) -> str:
    """The suffix of a file's name before any suffix in PACKED: .jsonl for x.jsonl.gz."""
    path = PurePosixPath(name)
    return PurePosixPath(path.stem).suffix if path.suffix in PACKED else path.suffix


def located(key: str, path: str) -> Path:
    """The path, or the UPath of an address. Raises UserError, which names `key`, if the path is unusable."""
    if "://" not in path:
        return user_path(key, path)
    import upath

    try:
        found = upath.UPath(path)
        assert found.fs is not None
    except Exception as error:  # a remote store may raise anything
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{key} is '{path}': {reason}; allowed: a path, or an address that fsspec knows") from error
    return cast(Path, found)


def is_remote(path: Path) -> bool:
    return not isinstance(path, Path)


def _globbed(path: Path, root: Path) -> Iterable[Path]:
    """The paths below `root` that match the glob `path`; `**` does not follow links to folders."""
    pattern = str(path) if str(root) == "." else str(path)[len(str(root)) :].lstrip("/")
    return root.glob(pattern)


def real(paths: Iterable[Path]) -> frozenset[Any]:
    """The paths with links resolved; addresses stay unchanged."""
    return frozenset(path if is_remote(path) else path.resolve() for path in paths)


def _distinct(files: dict[str, Path]) -> dict[str, Path]:
    """The files sorted by name. A file that links give several names appears once, so that training and validation
    cannot share it.
    """
    seen: dict[Any, str] = {}
    for name in sorted(files):
        seen.setdefault(next(iter(real([files[name]]))), name)
    return {name: files[name] for name in seen.values()}


@contextmanager
def opened(path: Path) -> Iterator[BinaryIO]:
    """Opens a file for reading bytes, decompressed if its suffix is in PACKED.

    Raises:
      UserError: the file is damaged or cannot be opened or, inside the `with` block, cannot be read.
    """
    try:
        with path.open("rb") as raw, _unpacked(path, raw) as file:
            yield file
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        packed = f", or not a whole {path.suffix} file" if path.suffix in PACKED else ""
        raise UserError(f"{path}: unreadable ({reason}){packed}") from error


def _unpacked(path: Path, raw: BinaryIO) -> Any:
    if path.suffix == ".gz":
        return gzip.GzipFile(fileobj=raw)
    if path.suffix in (".bz2", ".xz"):
        return io.BufferedReader(_Streams(raw, bz2.BZ2Decompressor if path.suffix == ".bz2" else _xz))
    if path.suffix == ".zst":
        import pyarrow  # its reader, unlike others, notices a truncated file

        stream = pyarrow.CompressedInputStream(pyarrow.PythonFile(raw, mode="r"), "zstd")  # has no readline
        return io.BufferedReader(cast(io.RawIOBase, stream), 1 << 20)
    return raw


def _xz() -> lzma.LZMADecompressor:
    return lzma.LZMADecompressor(memlimit=XZ_MEMORY)


class _Streams(io.RawIOBase):
    """Reads the streams of a .bz2 or .xz file one after the other, decompressed. Python's own readers take a damaged
    stream after the first for the end of the file.
    """

    def __init__(self, raw: BinaryIO, make: Callable[[], Any]):
        self._raw, self._make, self._stream = raw, make, make()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while True:
            if self._stream.eof:
                rest = self._stream.unused_data.lstrip(b"\0")  # without padding
                while not rest:
                    if not (block := self._raw.read(1 << 20)):
                        return 0
                    rest = block.lstrip(b"\0")
                self._stream = self._make()
                data = self._stream.decompress(rest, len(buffer))
            else:
                more = self._raw.read(1 << 20) if self._stream.needs_input else b""
                if self._stream.needs_input and not more:
                    raise EOFError("the file ends too soon")
                data = self._stream.decompress(more, len(buffer))
            if data:
                buffer[: len(data)] = data
                return len(data)


def content_hash(path: Path) -> str:
    """The sha256 of a file's bytes, as hex digits.

    Raises:
      UserError: the path is not a file, or it cannot be read.
    """
    try:
        if path.exists() and not path.is_file():  # reading a pipe would never end
            raise UserError(f"{path}: not a file; allowed: a file")
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"{path}: unreadable ({error.strerror})") from error


def identify(files: dict[str, Path]) -> list[list[Any]]:
    """[name, size, version] of each file.

    The version is the sha256 of the content. If the files together exceed HASH_LIMIT bytes, it is the time of the
    last change, because every start would have to read them all. For a remote file, its store gives the version.
    """
    stats = {name: stat_of(path) for name, path in files.items()}
    by_content = sum(s.st_size for s in stats.values()) <= HASH_LIMIT
    found = []
    for name, s in stats.items():
        remote = cast(Any, files[name]) if is_remote(files[name]) else None
        version = remote.fs.ukey(remote.path) if remote else content_hash(files[name]) if by_content else s.st_mtime_ns
        found.append([name, s.st_size, version])
    return found


def unit_bytes(total: int) -> int:
    """The size of a unit, in bytes, where a source has `total` bytes."""
    return max(UNIT_BYTES, -(-total // MAX_UNITS))


def grouped(items: Iterable[T], size: Callable[[T], int], limit: int) -> list[list[T]]:
    """The items in order, in groups of about `limit` bytes; `size` returns an item's bytes."""
    groups: list[list[T]] = []
    left = 0
    for item in items:
        if 4 * left < limit:
            groups.append([])
            left = limit
        groups[-1].append(item)
        left -= size(item)
    return groups


def line_ends(path: Path, start: int, stop: int, step: int) -> list[int]:
    """Where to cut the bytes [start, stop) of an uncompressed file, about every `step` bytes: the positions of newlines
    that end a line that is not empty.
    """
    cuts = []
    with opened(path) as file:
        for position in range(start + step, stop - step // 2, step):
            file.seek(position)
            found = re.search(rb"[^\n]\n", file.read(min(LINE_BYTES, stop - position)))
            if found and (not cuts or position > cuts[-1]):
                cuts.append(position + found.start() + 1)
    return cuts


def skip(file: BinaryIO, num_bytes: int) -> None:
    """Moves `num_bytes` forward in a file, by reading if it cannot seek."""
    if file.seekable():
        file.seek(num_bytes, io.SEEK_CUR)
        return
    while num_bytes and (block := file.read(min(num_bytes, 1 << 20))):
        num_bytes -= len(block)
