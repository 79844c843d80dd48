"""The kinds of data sources. What differs between them is said here; no other module compares their names.

A new one is an entry here, a file in `jaxlm/data/sources/` and its entry in `jaxlm/data/sources/__init__.py`.
"""

from typing import Literal, NamedTuple

SourceName = Literal["stdlib", "text", "jsonl", "parquet", "tfds", "tokens", "synthetic"]


class SourceKind(NamedTuple):
    named_by: Literal["path", "tfds_name", "source"]  # the key of `data` that says which data it is
    files: bool = False  # `path` and `val_path` are files, folders or globs
    suffixes: tuple[str, ...] = ()  # of its files: in a folder that has such, others are left out; () = any
    split_files: tuple[str, ...] = ()  # names of files that side by side are its training and its validation data
    beside: tuple[str, ...] = ()  # names of files next to those that are read too
    records: bool = False  # has records, of which `text_key` and other keys are the text
    splits: bool = False  # has splits by name: `split`, `val_split`; `path` is its folder
    ids: bool = False  # gives token ids, not text
    mixed: bool = True  # may be a part of `mixture`


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
        beside=("meta.pkl",),  # nanoGPT's, in one folder
    ),
    "synthetic": SourceKind("source", ids=True, mixed=False),
}
