"""JSON-lines and Parquet files: a document a record."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jaxlm.config import DataConfig, UserError
from jaxlm.data.files import identify, opened, train_and_val
from jaxlm.data.sources import Document, Source, Split, held_out, parts_of


def open_records(data: DataConfig) -> Source:
    """The documents of `data.path` and `data.val_path`, whose source is jsonl or parquet.

    Without `data.val_path` a record's file and place in it decide whether it is held out.

    Raises:
      UserError: there are no files, or, while documents are read, a file is damaged, or a record is no good and
        `data.on_error` is stop.
    """
    records, unit = (_lines, "line") if data.source == "jsonl" else (_rows, "row")
    files, val = train_and_val(data)
    skipped: dict[str, int] = {}

    def documents(which: Split) -> Iterator[Document]:
        skipped[which] = 0
        for name, path in (val if val and which == "val" else files).items():
            for number, record in records(path, data.text_key):
                if not val and held_out(f"{name}:{number}", data.val_fraction) != (which == "val"):
                    continue
                try:
                    text = _text(record, f"{path} {unit} {number}", data.text_key)
                except UserError:
                    if data.on_error == "stop":
                        raise
                    skipped[which] += 1
                    continue
                for index, part in enumerate(parts_of(text)):
                    yield Document(f"{name} {unit} {number}", part, first=index == 0)

    key = {
        "source": data.source, "text_key": data.text_key, "on_error": data.on_error, "train": identify(files),
        "val": identify(val), "val_fraction": None if val else data.val_fraction,
    }  # fmt: skip
    return Source(key, documents, 0, skipped)


def _lines(path: Path, key: str) -> Iterator[tuple[int, bytes]]:
    """The lines that are not blank, counted from 1 with those that are."""
    with opened(path) as file:
        for number, line in enumerate(iter(file.readline, b""), 1):
            if line.strip():
                yield number, line


def _rows(path: Path, key: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """The rows, counted from 1, with the one column in which `key` leads to a text."""
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            column, columns = key.split(".")[0], file.schema_arrow.names
            if column not in columns:
                raise UserError(
                    f"data.text_key is '{key}'; allowed with {path}: {', '.join(columns)}, or inside of them"
                )
            number = 0
            for batch in file.iter_batches(columns=[column]):
                for record in batch.to_pylist():
                    number += 1
                    yield number, record
    except UserError:
        raise
    except (OSError, ValueError, pyarrow.ArrowException) as error:
        raise UserError(f"{path}: unreadable as Parquet ({' '.join(str(error).split())})") from error


def _text(record: bytes | dict[str, Any], where: str, key: str) -> str:
    """The text of a line of JSON, or of a row. Raises UserError where there is none under the key, or an empty one."""
    value: Any = record
    if isinstance(record, bytes):
        try:
            value = json.loads(record.decode())
        except UnicodeDecodeError as error:
            raise UserError(f"{where}: not UTF-8 at byte {error.start} of it; allowed: UTF-8") from None
        except (ValueError, RecursionError) as error:
            raise UserError(f"{where}: no JSON ({error}); allowed: an object a line") from None
    for name in key.split("."):
        if not isinstance(value, dict) or name not in value:
            keys = ", ".join(value) if isinstance(value, dict) else f"none in {type(value).__name__}"
            raise UserError(f"{where}: no '{key}' (data.text_key); its keys: {keys[:200]}")
        value = value[name]
    if not isinstance(value, str) or not value:
        what = "empty" if value == "" else type(value).__name__
        raise UserError(f"{where}: '{key}' is {what}; allowed: a text")
    if "\0" in value:
        raise UserError(f"{where}: '{key}' holds a NUL character; allowed: text")
    return value
