"""JSON-lines and Parquet files: a document a record."""

import functools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jaxlm.config import DataConfig, UserError
from jaxlm.data.files import identify, list_files, opened
from jaxlm.data.sources import Document, Source, Split, held_out, parts_of

TextRow = tuple[str, str | UserError]  # where it is; its text, or what is wrong with it


def open_records(data: DataConfig) -> Source:
    """The documents of `data.path` and `data.val_path`, whose source is jsonl or parquet.

    Without `data.val_path` a record's file and place in it decide whether it is held out.

    Raises:
      UserError: there are no files, or, while documents are read, a record is no good and `data.on_error` is stop.
    """
    read = functools.partial(_jsonl if data.source == "jsonl" else _parquet, key=data.text_key)
    files = list_files("data.path", data.path)
    val = list_files("data.val_path", data.val_path) if data.val_path else {}
    inside = {path.resolve() for path in val.values()}
    files = {name: path for name, path in files.items() if path.resolve() not in inside}
    if not files:
        raise UserError(f"data.path {data.path}: every file is in data.val_path too; allowed: other files")
    source: Source

    def documents(which: Split) -> Iterator[Document]:
        skipped = 0
        for name, path in (val if val and which == "val" else files).items():
            for row, (place, text) in enumerate(read(path)):
                if not val and held_out(f"{name}:{row}", data.val_fraction) != (which == "val"):
                    continue
                if not isinstance(text, UserError):
                    for index, part in enumerate(parts_of(text)):
                        yield Document(f"{name}:{place}", part, first=index == 0)
                elif data.on_error == "stop":
                    raise text
                else:
                    skipped += 1
        source.skipped[which] = skipped

    key = {
        "source": data.source, "text_key": data.text_key, "on_error": data.on_error, "train": identify(files),
        "val": identify(val), "val_fraction": None if val else data.val_fraction,
    }  # fmt: skip
    source = Source(key, documents, 0, {})
    return source


def _jsonl(path: Path, key: str) -> Iterator[TextRow]:
    with opened(path) as file:
        for number, line in enumerate(iter(file.readline, b""), 1):
            place = f"line {number}"
            if not line.strip():
                continue
            try:
                yield place, _text(json.loads(line), f"{path} {place}", key)
            except UnicodeDecodeError as error:
                yield place, UserError(f"{path} {place}: not UTF-8 at byte {error.start} of it; allowed: UTF-8")
            except (ValueError, RecursionError) as error:
                reason = error if isinstance(error, UserError) else UserError(
                    f"{path} {place}: no JSON ({error}); allowed: an object a line"
                )  # fmt: skip
                yield place, reason


def _parquet(path: Path, key: str) -> Iterator[TextRow]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            column = key.split(".")[0]
            if column not in file.schema_arrow.names:
                names = ", ".join(file.schema_arrow.names)
                raise UserError(f"data.text_key is '{key}'; allowed with {path}: {names}, and what is inside of them")
            row = 0
            for batch in file.iter_batches(columns=[column]):
                for record in batch.to_pylist():
                    row += 1
                    try:
                        yield f"row {row}", _text(record, f"{path} row {row}", key)
                    except UserError as error:
                        yield f"row {row}", error
    except UserError:
        raise
    except (OSError, ValueError, pyarrow.ArrowException) as error:
        raise UserError(f"{path}: unreadable as Parquet ({' '.join(str(error).split())})") from error


def _text(record: Any, where: str, key: str) -> str:
    """Raises UserError where there is no text under the key, or only an empty one."""
    value = record
    for name in key.split("."):
        if not isinstance(value, dict) or name not in value:
            keys = ", ".join(value) if isinstance(value, dict) else f"none in {type(value).__name__}"
            raise UserError(f"{where}: no '{key}' (data.text_key); its keys: {keys[:200]}")
        value = value[name]
    if not isinstance(value, str) or not value:
        what = "empty" if value == "" else f"{type(value).__name__}"
        raise UserError(f"{where}: '{key}' is {what}; allowed: a text")
    if "\0" in value:
        raise UserError(f"{where}: '{key}' holds a NUL character; allowed: text")
    return value
