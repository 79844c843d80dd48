"""Files of records, such as JSON lines and Parquet. Each record is a document: a text or a conversation."""

import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from jaxlm.config import DataConfig, UserError, show
from jaxlm.data.sources.conversations import Template, conversation, template_of
from jaxlm.data.sources.documents import (
    Document,
    Skipped,
    Source,
    Spans,
    Split,
    TextPiece,
    Unit,
    held_out,
    parts_of,
)
from jaxlm.data.sources.files import grouped, identify, real, unit_bytes
from jaxlm.data.sources.jinja_templates import TRAINING_DATE, ChatTemplate
from jaxlm.data.sources.splits import Files, find_files


class RecordPart(NamedTuple):
    """A file or a part of a file."""

    name: str
    path: Path
    split: Split | None  # None: decided for each record by its place
    num_bytes: int
    start: int = 0  # in bytes, or in row groups for Parquet
    stop: int | None = None
    first_row: int = 0  # the number of rows before the part, in a Parquet file


class NoColumn(UserError):
    """The configured key is wrong, not the file."""


class Format(NamedTuple):
    """How to read records from a kind of file."""

    unit: str  # the name of a record in errors: line, row
    cut: Callable[[RecordPart, int], list[RecordPart]]  # cuts a file in parts of about that many bytes
    # Yields each record's place in the file, a function that returns its number (from 1), and its bytes or columns.
    read: Callable[[RecordPart, DataConfig], Iterator[tuple[int, Callable[[], int], Any]]]
    split_by: str = ""  # the column whose text decides which records are held out; "" = the record's place decides


def open_records(data: DataConfig, form: Format, found: Files | None = None, skipped: int = 0) -> Source:
    """The documents of `data.path` and `data.val_path`, or of the files that are `found`.

    Without `data.val_path`, a hash of a record's file name and place, or of its column `form.split_by`, decides whether
    it is held out.

    Args: skipped: number of files that were left out.

    Raises:
      UserError: there are no files or, while documents are read, a key names no column or, if `data.on_error` is stop,
        a file is damaged or a record is unusable.
    """
    files, val, notes = found or find_files(data)
    shapes = {k: getattr(data, k) for k in ("source", "text_key", "on_error", *conversation_keys(data))}
    template = template_of(data, None) if conversation_keys(data) else ""
    if isinstance(template, ChatTemplate):
        shapes["chat_template"] = {**template._asdict(), "today": TRAINING_DATE.isoformat()}
    key = {
        **shapes,
        "train": identify(files),
        "val": identify(val),
        "val_fraction": None if val else data.val_fraction,
    }

    def units() -> list[Unit]:
        whole = [RecordPart(n, p, "train" if val else None, p.stat().st_size) for n, p in files.items()]
        whole += [RecordPart(n, p, "val", p.stat().st_size) for n, p in val.items()]
        limit = unit_bytes(sum(part.num_bytes for part in whole))
        parts = [piece for part in whole for piece in form.cut(part, limit)]
        groups = grouped(parts, lambda part: part.num_bytes, limit)
        return [Unit(partial(_read, group, data, form, template)) for group in groups]

    masked, paths = bool(conversation_keys(data)), real([*files.values(), *val.values()])
    name = data.path or data.val_path or data.source
    return Source(name, key, units, 0, masked=masked, skipped=skipped, files=paths, notes=notes)


def conversation_keys(data: DataConfig) -> tuple[str, ...]:
    if data.messages_key:
        return ("messages_key", "chat_template")
    return ("prompt_key", "response_key", "chat_template") if data.response_key else ()


def _read(parts: list[RecordPart], data: DataConfig, form: Format, template: Template) -> Iterator[Document | Skipped]:
    for part in parts:
        try:
            yield from _read_part(part, data, form, template)
        except UserError as error:
            if data.on_error == "stop" or isinstance(error, NoColumn):
                raise
            yield Skipped(str(error))  # in place of the rest of a damaged file


def _read_part(part: RecordPart, data: DataConfig, form: Format, template: Template) -> Iterator[Document | Skipped]:
    for place, number, record in form.read(part, data):
        split = part.split
        if split is None:
            decides = record[form.split_by] if form.split_by else f"{part.name}:{place}"
            split = "val" if held_out(decides, data.val_fraction) else "train"
        try:
            texts = _texts(record, data, template)
        except UserError as error:
            reason = f"{part.path} {form.unit} {number()}{error}"
            if data.on_error == "stop":
                raise UserError(reason) from None
            yield Skipped(reason)
            continue
        first = True
        for text, learned, markup, shipped in texts:
            at = 0
            for piece in parts_of(text):
                spans = _within(markup, at, len(piece))
                yield Document(f"{part.name} {place}", piece, split, first, learned, spans, shipped)
                first, at = False, at + len(piece)


def _within(spans: Spans, start: int, length: int) -> Spans:
    """The spans of a text that fall in its part of `length` characters from `start`, relative to the part."""
    clipped = [(max(a - start, 0), min(b - start, length)) for a, b in spans]
    return tuple((a, b) for a, b in clipped if a < b)


def _texts(record: bytes | dict[str, Any], data: DataConfig, template: Template) -> list[TextPiece]:
    """The pieces of a record. Raises UserError, whose text continues a line that begins with the record's name."""
    value: Any = record
    if isinstance(record, bytes):
        try:
            value = json.loads(record.decode("utf-8-sig"))
        except UnicodeDecodeError as error:
            raise UserError(f": not UTF-8 at byte {error.start} of the line; allowed: UTF-8") from None
        except (ValueError, RecursionError) as error:
            raise UserError(f": not JSON ({error}); allowed: one JSON object per line") from None
    if data.messages_key:
        return conversation(_at(value, "messages_key", data.messages_key), data.messages_key, template)
    if data.response_key:
        asked = _text(value, "prompt_key", data.prompt_key, empty=True) if data.prompt_key else ""
        answer = _text(value, "response_key", data.response_key)
        if not template:
            return [TextPiece(asked, False)] * bool(asked) + [TextPiece(answer, True)]
        turns = [{"role": "user", "content": asked}] if asked else []
        return conversation([*turns, {"role": "assistant", "content": answer}], "", template)
    return [TextPiece(_text(value, "text_key", data.text_key), True)]


def _at(value: Any, name: str, key: str) -> Any:
    """The value under `key`, whose dots lead into nested objects; `name` is the configuration key that holds it."""
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
