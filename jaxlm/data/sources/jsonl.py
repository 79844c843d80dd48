"""The source `jsonl`: JSON lines, one record per line."""

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path

from jaxlm.config import DataConfig, UserError
from jaxlm.data.sources.documents import Source
from jaxlm.data.sources.files import PACKED, is_remote, line_ends, opened, skip
from jaxlm.data.sources.records import Format, RecordPart, open_records

MAX_LINE_BYTES = 1 << 28  # a line is read into memory as a whole


def open_jsonl(data: DataConfig) -> Source:
    """The documents of files of JSON lines. Raises UserError as `open_records` does."""
    return open_records(data, Format("line", _cut, _lines))


def _cut(part: RecordPart, limit: int) -> list[RecordPart]:
    if part.num_bytes <= 2 * limit or part.path.suffix in PACKED:
        return [part]
    ends = [end + 1 for end in line_ends(part.path, 0, part.num_bytes, limit)]  # after the newline
    spans = itertools.pairwise([0, *ends, part.num_bytes])
    return [part._replace(start=a, stop=b, num_bytes=b - a) for a, b in spans]


def _lines(part: RecordPart, data: DataConfig) -> Iterator[tuple[int, Callable[[], int], bytes]]:
    """Yields (place, number, line) of each line that is not blank.

    `place` is the line's first byte (in the decompressed text, if the file is packed); `number()` counts lines, blank
    ones included, from 1, and counts only when it is called, because that reads the file again.
    """
    place, counted, at = part.start, 0, 0  # `counted` lines end before byte `at`

    def number() -> int:
        nonlocal counted, at
        counted, at = counted + _newlines(part.path, at, place), place
        return counted + 1

    # The `readline` of remote files takes no limit.
    limit = () if is_remote(part.path) and part.path.suffix not in PACKED else (MAX_LINE_BYTES + 1,)
    with opened(part.path) as file:
        if part.start:
            file.seek(part.start)
        while (part.stop is None or place < part.stop) and (line := file.readline(*limit)):
            if len(line) > MAX_LINE_BYTES:  # a small packed file may hold such a line
                raise UserError(f"{part.path} line {number()}: more than {MAX_LINE_BYTES >> 20} MiB; allowed: less")
            if line.strip():
                yield place, number, line
            place += len(line)


def _newlines(path: Path, start: int, stop: int) -> int:
    with opened(path) as file:
        skip(file, start)
        blocks = [min(1 << 20, stop - i) for i in range(start, stop, 1 << 20)]
        return sum(file.read(size).count(b"\n") for size in blocks)
