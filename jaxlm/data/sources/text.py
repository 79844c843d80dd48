"""The source `text`: each file is a document; of a single file, the end is held out."""

import codecs
import dataclasses
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxlm.config import DataConfig, UserError
from jaxlm.data.sources.documents import BLOCK, Document, Skipped, Source, Split, Unit, digest, held_out
from jaxlm.data.sources.files import PACKED, grouped, identify, line_ends, name_of, opened, real, skip, unit_bytes
from jaxlm.data.sources.splits import find_files


def open_text(data: DataConfig) -> Source:
    """The documents of `data.path` and `data.val_path`.

    Raises:
      UserError: there are no files or, while documents are read, a file is not text and `data.on_error` is stop.
    """
    files, val, notes = find_files(data)
    if not val:
        source = _one_file(data, *files.popitem()) if len(files) == 1 else by_name(data, files)
        return dataclasses.replace(source, notes=notes)
    parts = [TextPart(n, p, "train") for n, p in files.items()] + [TextPart(n, p, "val") for n, p in val.items()]
    source = _text_source(data, {"train": identify(files), "val": identify(val)}, parts)
    return dataclasses.replace(source, notes=notes)


def by_name(data: DataConfig, files: dict[str, Path], skipped: int = 0) -> Source:
    """One document per file. Names decide which `val_fraction` of them is held out: at least one, never all."""
    held = {name for name in files if held_out(name, data.val_fraction)}
    if not held:  # with few files, hold out the one whose name has the lowest hash
        held = {min(files, key=digest)}
    if len(held) == len(files):
        held.remove(max(files, key=digest))
    parts = [TextPart(name, path, "val" if name in held else "train") for name, path in files.items()]
    return _text_source(data, {"files": identify(files), "val_fraction": data.val_fraction}, parts, skipped)


def _one_file(data: DataConfig, name: str, path: Path) -> Source:
    """Two documents: the last `val_fraction` of a file's characters is for validation, the rest for training."""

    def units() -> list[Unit]:
        cut = _byte_of_character(path, 1 - data.val_fraction)
        parts = [TextPart(f"{name} (train)", path, "train", 0, cut), TextPart(f"{name} (val)", path, "val", cut)]
        return _units([part for part in parts if part.stop != 0], cuts=True)

    key = {"source": data.source, "files": identify({name: path}), "val_fraction": data.val_fraction}
    return Source(str(path), key, units, _text_size(path), files=real([path]))


def _byte_of_character(path: Path, share: float) -> int:
    """The byte (of the decompressed text, if the file is packed) where the first `share` of the characters ends."""
    with opened(path) as file:
        counts = [int(np.count_nonzero(_opens_character(block))) for block in iter(partial(file.read, BLOCK), b"")]
    ends = np.cumsum([0, *counts])
    cut = int(int(ends[-1]) * share)
    block = int(np.searchsorted(ends, cut, "right")) - 1
    with opened(path) as file:
        skip(file, block * BLOCK)
        opens = np.flatnonzero(_opens_character(file.read(BLOCK)))
    return block * BLOCK + (int(opens[cut - ends[block]]) if len(opens) else 0)


def _opens_character(block: bytes) -> np.ndarray:
    """bool [n]: which bytes begin a character of UTF-8."""
    return (np.frombuffer(block, np.uint8) & 0xC0) != 0x80


class TextPart(NamedTuple):
    """A text file or a part of one."""

    name: str
    path: Path
    split: Split
    start: int = 0  # in bytes of the decompressed text
    stop: int | None = None
    first: bool = True


def _text_source(data: DataConfig, key: dict[str, Any], parts: list[TextPart], skipped: int = 0) -> Source:
    key = {"source": data.source, "on_error": data.on_error} | key
    skips = data.on_error == "skip"
    name = name_of(data) or data.val_path or data.source
    size = _text_size(*(part.path for part in parts))
    paths = real(part.path for part in parts)
    return Source(name, key, lambda: _units(parts, cuts=not skips, skips=skips), size, skipped=skipped, files=paths)


def _units(parts: list[TextPart], cuts: bool, skips: bool = False) -> list[Unit]:
    """Units of about the same size; large parts are cut at the ends of lines if `cuts` is set."""
    limit = unit_bytes(sum(map(_part_size, parts)))
    pieces: list[TextPart] = []
    for part in parts:
        stop, ends = part.start + _part_size(part), []
        if cuts and stop - part.start > 2 * limit and part.path.suffix not in PACKED:
            ends = line_ends(part.path, part.start, stop, limit)
        starts = [part.start, *ends]
        pieces += [
            part._replace(start=a, stop=b, first=a == part.start)
            for a, b in zip(starts, [*ends, part.stop], strict=True)
        ]
    return [Unit(partial(_read_text, group, skips)) for group in grouped(pieces, _part_size, limit)]


def _part_size(part: TextPart) -> int:
    return max((part.path.stat().st_size if part.stop is None else part.stop) - part.start, 0)


def _text_size(*paths: Path) -> int:
    """Bytes of text in the files; 0 if unknown, because a file is packed."""
    return 0 if any(path.suffix in PACKED for path in paths) else sum(path.stat().st_size for path in paths)


def _read_text(parts: list[TextPart], skips: bool) -> Iterator[Document | Skipped]:
    for part in parts:
        if skips:  # read the file to its end first, so that a damaged one gives no text at all
            try:
                for _ in read_parts(part.path, part.start, part.stop):
                    pass
            except UserError as error:
                yield Skipped(str(error))
                continue
        first = part.first
        for text in read_parts(part.path, part.start, part.stop):
            yield Document(part.name, text, part.split, first)
            first = False


def read_parts(path: Path, start: int = 0, stop: int | None = None) -> Iterator[str]:
    """Yields the text of a file from byte `start` to `stop`, unchanged, in parts of about BLOCK bytes.

    A part ends before a newline where possible. sentencepiece's tokens never reach from a line into the newline after
    it, so the parts get the same ids as the whole.

    Raises:
      UserError: the file cannot be read, is not UTF-8 or holds a NUL; names the byte (of the decompressed text, if the
        file is packed).
    """
    decoder = codecs.getincrementaldecoder("utf-8")()
    rest, offset, block = "", start, b"-"
    try:
        with opened(path) as file:
            skip(file, start)
            while block:
                block = file.read(BLOCK if stop is None else min(BLOCK, stop - offset))
                if b"\0" in block:
                    raise UserError(f"{path}: a NUL at byte {offset + block.index(0)}; allowed: text")
                offset += len(block)
                text = rest + decoder.decode(block, final=not block)
                cut = len(text[: text.rfind("\n") + 1].rstrip("\n")) if block else 0
                part, rest = (text[:cut], text[cut:]) if cut else (text, "")
                if part:
                    yield part
    except UnicodeDecodeError as error:
        at = offset - len(error.object) + error.start
        raise UserError(f"{path}: not UTF-8 at byte {at} ({error.reason}); allowed: UTF-8 text") from None
