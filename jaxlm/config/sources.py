"""The kinds of data sources, and how they differ. No other module compares their names.

To add a kind, add an entry here, a file in `jaxlm/data/sources/` and its entry in `jaxlm/data/sources/opening.py`.
"""

from typing import Literal, NamedTuple

SourceName = Literal["stdlib", "text", "jsonl", "parquet", "tfds", "tokens", "synthetic", "functions"]


class SourceKind(NamedTuple):
    named_by: Literal["path", "tfds_name", "source"]  # the key of `data` that identifies the data
    files: bool = False  # `path` and `val_path` are files, folders or globs
    suffixes: tuple[str, ...] = ()  # if a folder has files with these suffixes, its other files are left out; () = any
    split_files: tuple[str, ...] = ()  # names of the training and the validation file, if both are in one folder
    beside: tuple[str, ...] = ()  # names of files next to these two that are read too
    records: bool = False  # has records whose text is at `text_key` or other keys
    splits: bool = False  # has named splits, `split` and `val_split`; `path` is the folder of prepared data
    ids: bool = False  # yields token ids, not text
    mixed: bool = True  # may be part of a `mixture`


SOURCES: dict[str, SourceKind] = {
    "stdlib": SourceKind("source"),
    "text": SourceKind("path", files=True),
    "jsonl": SourceKind("path", files=True, suffixes=(".jsonl", ".ndjson", ".json"), records=True),
    "parquet": SourceKind("path", files=True, suffixes=(".parquet", ".pq"), records=True),
    "tfds": SourceKind("tfds_name", splits=True),
    "tokens": SourceKind(
        "path",
        files=True,
        suffixes=(".bin", ".npy"),
        ids=True,
        split_files=("train.bin", "val.bin"),
        beside=("meta.pkl",),  # as nanoGPT prepares a folder
    ),
    "synthetic": SourceKind("source", ids=True, mixed=False),
    "functions": SourceKind("source", records=True),
}
