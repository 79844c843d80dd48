"""JSON-lines and Parquet files: a document a record, a text or a conversation."""

import itertools
import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from jaxlm.config import DataConfig, UserError, show
from jaxlm.data.sources.conversations import Piece, Spans, conversation
from jaxlm.data.sources.documents import Document, Skipped, Source, Split, Unit, held_out, parts_of
from jaxlm.data.sources.files import PACKED, grouped, identify, is_remote, line_ends, opened, real, skip, unit_bytes
from jaxlm.data.sources.splits import find_files

MAX_LINE_BYTES = 1 << 28  # of a record, which is read as a whole


class Part(NamedTuple):
    """Of a file, or all of it."""

    name: str
    path: Path
    split: Split | None  # None: each record's place decides
    num_bytes: int
    start: int = 0  # in bytes, or in row groups
    stop: int | None = None
    first_row: int = 0  # of a Parquet file's, counted from 0


class NoColumn(UserError):
    """The key is wrong, not the file."""


def open_records(data: DataConfig) -> Source:
    """The documents of `data.path` and `data.val_path`, whose source is jsonl or parquet.

    Without `data.val_path` a record's file and place in it decide whether it is held out.

    Raises:
      UserError: there are no files, or, while documents are read, a file is damaged, or a record is no good and
        `data.on_error` is stop.
    """
    files, val, notes, _ = find_files(data)
    shapes = {k: getattr(data, k) for k in ("source", "text_key", "on_error", *_conversation_keys(data))}
    key = {
        **shapes, "train": identify(files), "val": identify(val), "val_fraction": None if val else data.val_fraction,
    }  # fmt: skip

    def units() -> list[Unit]:
        whole = [Part(n, p, "train" if val else None, p.stat().st_size) for n, p in files.items()]
        whole += [Part(n, p, "val", p.stat().st_size) for n, p in val.items()]
        limit = unit_bytes(sum(part.num_bytes for part in whole))
        cut = _cut_lines if data.source == "jsonl" else _cut_rows
        parts = [piece for part in whole for piece in cut(part, limit)]
        return [Unit(partial(_read, group, data))
                for group in grouped(parts, lambda part: part.num_bytes, limit)]  # fmt: skip

    return Source(data.path or data.val_path, key, units, 0, masked=bool(_conversation_keys(data)),
                  files=real([*files.values(), *val.values()]), notes=notes)  # fmt: skip


def _conversation_keys(data: DataConfig) -> tuple[str, ...]:
    if data.messages_key:
        return ("messages_key", "chat_template")
    return ("prompt_key", "response_key", "chat_template") if data.response_key else ()


def _cut_lines(part: Part, limit: int) -> list[Part]:
    if part.num_bytes <= 2 * limit or part.path.suffix in PACKED:
        return [part]
    ends = [end + 1 for end in line_ends(part.path, 0, part.num_bytes, limit)]  # after the newline
    spans = itertools.pairwise([0, *ends, part.num_bytes])
    return [part._replace(start=a, stop=b, num_bytes=b - a) for a, b in spans]


def _cut_rows(part: Part, limit: int) -> list[Part]:
    rows, pieces = 0, []
    try:
        opened_file = _parquet(part.path)
    except UserError:  # said, or skipped, when it is read
        return [part]
    with opened_file as file:
        groups = [file.metadata.row_group(i) for i in range(file.metadata.num_row_groups)]
        for group in grouped(enumerate(groups), lambda g: g[1].total_byte_size, limit):
            first, last = group[0][0], group[-1][0]
            size = sum(g.total_byte_size for _, g in group)
            pieces.append(part._replace(start=first, stop=last + 1, num_bytes=size, first_row=rows))
            rows += sum(g.num_rows for _, g in group)
    return pieces


def _read(parts: list[Part], data: DataConfig) -> Iterator[Document | Skipped]:
    for part in parts:
        try:
            yield from _read_part(part, data)
        except UserError as error:
            if data.on_error == "stop" or isinstance(error, NoColumn):
                raise
            yield Skipped(str(error))  # the rest of a damaged file


def _read_part(part: Part, data: DataConfig) -> Iterator[Document | Skipped]:
    records, unit = (_lines, "line") if data.source == "jsonl" else (_rows, "row")
    for place, number, record in records(part, data):
        split = part.split
        if split is None:
            split = "val" if held_out(f"{part.name}:{place}", data.val_fraction) else "train"
        try:
            texts = _texts(record, data)
        except UserError as error:
            reason = f"{part.path} {unit} {number()}{error}"
            if data.on_error == "stop":
                raise UserError(reason) from None
            yield Skipped(reason)
            continue
        first = True
        for text, learned, markup in texts:
            at = 0
            for piece in parts_of(text):
                yield Document(f"{part.name} {place}", piece, split, first, learned, _within(markup, at, len(piece)))
                first, at = False, at + len(piece)


def _within(spans: Spans, start: int, length: int) -> Spans:
    """The spans of a text in its part from `start` on."""
    clipped = [(max(a - start, 0), min(b - start, length)) for a, b in spans]
    return tuple((a, b) for a, b in clipped if a < b)


def _lines(part: Part, data: DataConfig) -> Iterator[tuple[int, Any, bytes]]:
    """The lines that are not blank: at which byte (of the text, where the file is packed), what gives its number,
    counted from 1 with the blank ones, and its bytes.
    """
    place, counted, at = part.start, 0, 0  # lines in the bytes before `at`

    def number() -> int:
        nonlocal counted, at
        counted, at = counted + _newlines(part.path, at, place), place
        return counted + 1

    # The files of a store elsewhere take no limit.
    limit = () if is_remote(part.path) and part.path.suffix not in PACKED else (MAX_LINE_BYTES + 1,)
    with opened(part.path) as file:
        if part.start:
            file.seek(part.start)
        while (part.stop is None or place < part.stop) and (line := file.readline(*limit)):
            if len(line) > MAX_LINE_BYTES:  # as a small packed file may hold
                raise UserError(f"{part.path} line {number()}: more than {MAX_LINE_BYTES >> 20} MiB; allowed: less")
            if line.strip():
                yield place, number, line
            place += len(line)


def _newlines(path: Path, start: int, stop: int) -> int:
    with opened(path) as file:
        skip(file, start)
        blocks = [min(1 << 20, stop - i) for i in range(start, stop, 1 << 20)]
        return sum(file.read(size).count(b"\n") for size in blocks)


def _parquet(path: Path) -> Any:
    import pyarrow
    import pyarrow.parquet

    try:
        return pyarrow.parquet.ParquetFile(path.open("rb") if is_remote(path) else path)
    except (OSError, ValueError, pyarrow.ArrowException) as error:
        raise UserError(f"{path}: unreadable as Parquet ({' '.join(str(error).split())})") from error


def _rows(part: Part, data: DataConfig) -> Iterator[tuple[int, Any, dict[str, Any]]]:
    """The rows: its number, counted from 1, what gives that number, and the columns in which the keys lead to texts."""
    import pyarrow

    keys = {k: getattr(data, k) for k in _conversation_keys(data) if k != "chat_template" and getattr(data, k)}
    with _parquet(part.path) as file:
        columns = file.schema_arrow.names
        for name, key in (keys or {"text_key": data.text_key}).items():
            if _column(key, columns) not in columns:
                allowed = f"allowed with {part.path}: {', '.join(columns)}, or inside of them"
                raise NoColumn(f"data.{name} is '{key}'; {allowed}")
        wanted = sorted({_column(key, columns) for key in keys.values() or [data.text_key]})
        row = part.first_row
        groups = range(part.start, file.metadata.num_row_groups if part.stop is None else part.stop)
        try:
            for batch in file.iter_batches(batch_size=1024, row_groups=list(groups), columns=wanted):
                for record in batch.to_pylist():
                    row += 1
                    yield row, lambda row=row: row, record
        except UserError:
            raise
        except (OSError, ValueError, OverflowError, pyarrow.ArrowException) as error:
            raise UserError(f"{part.path}: unreadable as Parquet ({' '.join(str(error).split())})") from error


def _column(key: str, columns: list[str]) -> str:
    return key if key in columns else key.split(".")[0]


def _texts(record: bytes | dict[str, Any], data: DataConfig) -> list[Piece]:
    """The pieces of a record. Raises UserError, what comes after the record's name."""
    value: Any = record
    if isinstance(record, bytes):
        try:
            value = json.loads(record.decode("utf-8-sig"))
        except UnicodeDecodeError as error:
            raise UserError(f": not UTF-8 at byte {error.start} of it; allowed: UTF-8") from None
        except (ValueError, RecursionError) as error:
            raise UserError(f": no JSON ({error}); allowed: an object a line") from None
    if data.messages_key:
        return conversation(_at(value, "messages_key", data.messages_key), data.messages_key, data.chat_template)
    if data.response_key:
        asked = _text(value, "prompt_key", data.prompt_key, empty=True) if data.prompt_key else ""
        answer = _text(value, "response_key", data.response_key)
        if not data.chat_template:
            return [Piece(asked, False)] * bool(asked) + [Piece(answer, True)]
        turns = [{"role": "user", "content": asked}] if asked else []
        return conversation([*turns, {"role": "assistant", "content": answer}], "", data.chat_template)
    return [Piece(_text(value, "text_key", data.text_key), True)]


def _at(value: Any, name: str, key: str) -> Any:
    """What is under a key, whose dots lead into objects."""
    if isinstance(value, dict) and key in value:
        return value[key]
    for part in key.split("."):
        if not isinstance(value, dict) or part not in value:
            keys = show(list(value)) if isinstance(value, dict) else f"none in {type(value).__name__}"
            raise UserError(f": no '{key}' (data.{name}); its keys: {keys}")
        value = value[part]
    return value


def _text(value: Any, name: str, key: str, empty: bool = False) -> str:
    value = _at(value, name, key)
    if not isinstance(value, str) or not (value or empty):
        what = "empty" if value == "" else type(value).__name__
        raise UserError(f": '{key}' is {what}; allowed: a text")
    if "\0" in value:
        raise UserError(f": '{key}' holds a NUL character; allowed: text")
    return value
