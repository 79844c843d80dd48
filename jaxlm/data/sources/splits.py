"""Decides which files of a path are for training, which for validation, and which are not data, such as a README."""

import re
from pathlib import Path
from typing import NamedTuple

from jaxlm.config import SOURCES, DataConfig, UserError
from jaxlm.data.sources.files import is_alone, key_of, list_files, located, named, stat_of, suffix_of

# Suffixes that suggest another source than `text`.
MEANT = {".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet"}
TRAIN_WORDS, VAL_WORDS = {"train", "training"}, {"val", "valid", "validation", "test"}
SHOWN = 3  # names in a note, at most


class Files(NamedTuple):
    train: dict[str, Path]  # {name: path}
    val: dict[str, Path]  # {name: path}; empty if a part of `train` is held out
    notes: tuple[str, ...]  # lines to print


def find_files(data: DataConfig) -> Files:
    """Returns the files of `data.path` that are not in `data.val_path`, the files of `data.val_path`, and notes.

    Without `data.val_path`, the source's `split_files` (train.bin and val.bin) are the two if `data.path` holds both.

    Raises:
      UserError: there are no files to train on, one of the `split_files` is empty, or validation files would be
        trained on.
    """
    kind = SOURCES[data.source]
    if kind.split_files and not is_alone(data):
        _check_not_empty([located(key_of(data), data.path) / name for name in kind.split_files])
    train, left_out = ({}, []) if is_alone(data) else list_files(key_of(data), data.path, kind.suffixes)
    val, others = list_files("data.val_path", data.val_path, kind.suffixes) if data.val_path else ({}, [])
    inside = {path.resolve() for path in val.values()}
    train = {name: path for name, path in train.items() if path.resolve() not in inside}
    if not train and not is_alone(data):
        raise UserError(f"data.path {data.path}: every file is in data.val_path too; allowed: other files")
    if not val and kind.split_files and train.keys() >= {*kind.split_files}:
        left_out = sorted({*left_out, *train} - {*kind.split_files, *kind.beside})
        train, val = ({name: train[name]} for name in kind.split_files)
    if not val and kind.suffixes:  # in a text source test_x.txt is a document like any other
        _check_names(data, train)
    notes = [
        _left_out(named(data), left_out),
        _left_out(f"data.val_path={data.val_path}", others),
        _meant(data, [*train, *val]) if not kind.suffixes else "",
    ]
    return Files(train, val, tuple(note for note in notes if note))


def _check_not_empty(files: list[Path]) -> None:
    """Raises UserError if all files exist and one is empty: otherwise the other would be split without notice."""
    if all(path.is_file() for path in files):
        for path in files:
            if not stat_of(path).st_size:
                raise UserError(f"{path}: empty; allowed: token ids")


def _check_names(data: DataConfig, files: dict[str, Path]) -> None:
    """Raises UserError if, by their names, some files of one path are for training and some for validation."""
    words = {name: set(re.split("[^a-z]+", name.lower())) for name in files}
    train = [name for name in files if words[name] & TRAIN_WORDS]
    val = [name for name in files if words[name] & VAL_WORDS and name not in train]
    if train and val:
        allowed = "only the first" if data.mixture else f"data.path={files[train[0]]} data.val_path={files[val[0]]}"
        raise UserError(
            f"{key_of(data)} is '{data.path}', which holds {train[0]} and {val[0]}, and would train on both; "
            f"allowed: {allowed}, or globs"
        )


def _left_out(where: str, names: list[str]) -> str:
    """A line that names the files that are left out; empty if there are none."""
    if not names:
        return ""
    shown = ", ".join(names[:SHOWN]) + ", …" * (len(names) > SHOWN)
    what = "a file that is" if len(names) == 1 else f"{len(names)} files that are"
    return f"{where}: leaves out {what} hidden or of another kind ({shown}); a glob takes every file that it matches"


def _meant(data: DataConfig, names: list[str]) -> str:
    """A line that suggests another source if some files have its suffix; empty if none have."""
    for suffix, source in MEANT.items():
        count = sum(suffix_of(name) == suffix for name in names)
        if count:
            what = f"a {suffix} file is" if count == 1 else f"{count} {suffix} files are"
            return f"{named(data)}: {what} read as plain text; data.source={source} reads the texts of its records"
    return ""
