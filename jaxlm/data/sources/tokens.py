"""The source `tokens`: a prepared token store, or files of ids such as a nanoGPT folder."""

import itertools
from pathlib import Path

import numpy as np

from jaxlm.config import SOURCES, Config, UserError
from jaxlm.config.paths import user_path
from jaxlm.data.corpus import Corpus
from jaxlm.data.progress import say_once
from jaxlm.data.sources.files import is_alone, is_remote, key_of
from jaxlm.data.sources.ids import corpus_of, starts_of
from jaxlm.data.sources.nanogpt import read_meta
from jaxlm.data.sources.splits import Files, find_files
from jaxlm.data.sources.token_arrays import check_ids, open_array
from jaxlm.data.store_reader import open_store
from jaxlm.data.tokenizers import load_tokenizer
from jaxlm.data.tokens import Tokens

KIND = SOURCES["tokens"]


def open_tokens(config: Config, progress: bool) -> Corpus:
    """The corpus of a prepared store or of files of token ids.

    Raises:
      UserError: the data is missing or of another kind, or does not fit the configuration.
    """
    data = config.data
    if data.val_path and _is_store("data.val_path", data.val_path):
        raise UserError(
            f"data.val_path is '{data.val_path}', a token store; allowed: files of token ids, or the store as "
            "data.path, because a store has its own validation part"
        )
    if is_alone(data) or not _is_store(key_of(data), data.path):
        return _of_files(config, progress)
    if data.val_path:
        raise UserError(f"data.val_path is '{data.val_path}'; allowed with a token store, which has its own: none")
    return open_store(user_path(key_of(data), data.path))


def _is_store(key: str, path: str) -> bool:
    return "://" not in path and (user_path(key, path) / "manifest.json").exists()


def _of_files(config: Config, progress: bool = False) -> Corpus:
    """The corpus of .bin files (little-endian uint16, as nanoGPT writes them, or with llm.c's header) or .npy files
    (1-D integers). Tokens are read from the files on demand; several files are read in the order of their names.

    Without `data.val_path`, val.bin is held out in a nanoGPT folder, and otherwise the last `data.val_fraction` of the
    tokens, from the start of a document if a tokenizer is known. `progress` prints notes to stderr, such as which files
    are left out.

    Raises:
      UserError: a file is missing or of another kind, or an id is too large for the tokenizer or `data.vocab_size`.
    """
    data, files = config.data, find_files(config.data)
    _check_kind([*files.train.values(), *files.val.values()])
    notes, tokenizer, vocab_size = [*files.notes], None, data.vocab_size
    if data.tokenizer_path:
        tokenizer = load_tokenizer(data.tokenizer_path)
        size = tokenizer.vocab_size
        if vocab_size < size:
            raise UserError(
                f"data.vocab_size is {vocab_size}; allowed with the tokenizer {data.tokenizer_path}: {size} or more"
            )
        if vocab_size > size:
            notes.append(
                f"data.vocab_size={vocab_size}: the tokenizer has {size} ids, and the model has logits only for these;"
                " model.vocab_multiple pads its tables"
            )
        vocab_size = size
    elif meta := _meta(files):
        tokenizer = read_meta(meta)
        vocab_size = tokenizer.vocab_size if tokenizer else vocab_size
        notes += [] if tokenizer else [f"{meta}: ignored, because it is not a table of characters as nanoGPT writes it"]
    for note in notes if progress else ():
        say_once(note)
    opened = [[open_array(path, vocab_size) for path in part.values()] for part in (files.train, files.val)]
    for path, array in itertools.chain(*opened):
        check_ids(array, path, vocab_size)
    train, val = ([array for _, array in part] for part in opened)
    if not files.val:
        whole = Tokens(train)
        cut = int(len(whole) * (1 - data.val_fraction))
        starts = starts_of(train, tokenizer.bos_id) if tokenizer else np.empty(0)
        if len(starts) > 1:  # cut where a document starts
            cut = int(next(iter(starts[starts >= cut]), len(whole)))
        train, val = whole.parts(0, cut), whole.parts(cut, len(whole))
    return corpus_of(config, vocab_size, train, val, tokenizer)


def _check_kind(paths: list[Path]) -> None:
    for path in paths:
        if is_remote(path):
            raise UserError(f"{path}: not on this machine; allowed with data.source=tokens: files of this machine")
        if path.suffix not in KIND.suffixes:
            raise UserError(
                f"{path}: a {path.suffix or 'plain'} file; allowed with data.source=tokens: " + ", ".join(KIND.suffixes)
            )


def _meta(files: Files) -> Path | None:
    """The path of nanoGPT's table of characters beside train.bin and val.bin; None if there is none."""
    if (*files.train, *files.val) != KIND.split_files:
        return None
    path = next(iter(files.train.values())).with_name(KIND.beside[0])
    return path if path.is_file() else None
