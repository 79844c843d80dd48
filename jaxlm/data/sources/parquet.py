"""The source `parquet`: Parquet files, one record per row."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from jaxlm.config import DataConfig, UserError
from jaxlm.data.sources.documents import Source
from jaxlm.data.sources.files import grouped, is_remote
from jaxlm.data.sources.records import Format, NoColumn, RecordPart, conversation_keys, open_records


def open_parquet(data: DataConfig) -> Source:
    """The documents of Parquet files. Raises UserError as `open_records` does."""
    return open_records(data, Format("row", _cut, _rows))


def _cut(part: RecordPart, limit: int) -> list[RecordPart]:
    rows, pieces = 0, []
    try:
        opened_file = _parquet(part.path)
    except UserError:  # reading the file raises or skips it
        return [part]
    with opened_file as file:
        groups = [file.metadata.row_group(i) for i in range(file.metadata.num_row_groups)]
        for group in grouped(enumerate(groups), lambda g: g[1].total_byte_size, limit):
            first, last = group[0][0], group[-1][0]
            size = sum(g.total_byte_size for _, g in group)
            pieces.append(part._replace(start=first, stop=last + 1, num_bytes=size, first_row=rows))
            rows += sum(g.num_rows for _, g in group)
    return pieces


def _parquet(path: Path) -> Any:
    import pyarrow
    import pyarrow.parquet

    try:
        return pyarrow.parquet.ParquetFile(path.open("rb") if is_remote(path) else path)
    except (OSError, ValueError, pyarrow.ArrowException) as error:
        raise UserError(f"{path}: unreadable as Parquet ({' '.join(str(error).split())})") from error


def _rows(part: RecordPart, data: DataConfig) -> Iterator[tuple[int, Callable[[], int], dict[str, Any]]]:
    """Yields (number, a function that returns the number, columns) of each row.

    Rows count from 1. Only the columns in which the configured keys lead to texts are read.
    """
    import pyarrow

    keys = {k: getattr(data, k) for k in conversation_keys(data) if k != "chat_template" and getattr(data, k)}
    with _parquet(part.path) as file:
        columns = file.schema_arrow.names
        for name, key in (keys or {"text_key": data.text_key}).items():
            if _column(key, columns) not in columns:
                allowed = f"allowed with {part.path}: {', '.join(columns)}, or keys inside them"
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
