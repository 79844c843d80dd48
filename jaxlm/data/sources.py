"""Documents: where the text comes from, and which of it is held out.

A source can be read again and again, and gives the same documents in the same order each time. Train and
validation never share a document.
"""

import codecs
import dataclasses
import hashlib
import sysconfig
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np

from jaxlm.config import DataConfig, UserError
from jaxlm.data.files import HASH_LIMIT, PACKED, identify, opened, train_and_val

Split = Literal["train", "val"]

BLOCK = 1 << 23  # bytes read at a time
SKIPPED_FOLDERS = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}


@dataclasses.dataclass(frozen=True)
class Document:
    name: str
    text: str
    first: bool = True  # False: goes on where the document before it stopped; a long file comes in parts


@dataclasses.dataclass(frozen=True)
class Source:
    key: dict[str, Any]  # JSON; all that shapes the documents
    documents: Callable[[Split], Iterator[Document]]
    num_bytes: int  # of all documents; 0 = unknown
    # Files of the standard library, or records of each split as it was last read, that are no good.
    skipped: Mapping[str, int] = dataclasses.field(default_factory=dict)


def open_source(data: DataConfig) -> Source:
    """The documents that `data.source`, one of stdlib, text, jsonl, parquet and tfds, names.

    Raises:
      UserError: there are none, or they cannot be read.
    """
    if data.source == "stdlib":
        return _stdlib(data)
    if data.source == "text":
        return _text(data)
    if data.source in ("jsonl", "parquet"):
        from jaxlm.data.records import open_records

        return open_records(data)
    from jaxlm.data.tfds_source import open_tfds

    return open_tfds(data)


def held_out(name: str, val_fraction: float) -> bool:
    """Whether a document is one of validation: depends on its name alone, so that others may come and go."""
    return _digest(name) % round(1 / val_fraction) == 0


def _digest(name: str) -> int:
    return int(hashlib.sha1(name.encode("utf-8", "surrogatepass")).hexdigest(), 16)


def _stdlib(data: DataConfig) -> Source:
    root = Path(sysconfig.get_paths()["stdlib"])
    paths = {path.relative_to(root).as_posix(): path for path in root.rglob("*.py")}
    paths = {name: paths[name] for name in sorted(paths) if not SKIPPED_FOLDERS.intersection(name.split("/")[:-1])}
    files, skipped = {}, 0
    for name, path in paths.items():
        try:
            if path.read_bytes().decode():
                files[name] = path
        except (UnicodeDecodeError, OSError):  # also a link to a file that this machine lacks
            skipped += 1
    if not files:
        raise UserError(f"data.source is 'stdlib', and {root} holds no .py files; allowed: another source")
    return _by_name(files, {"source": "stdlib"}, data.val_fraction, {"files": skipped})


def _text(data: DataConfig) -> Source:
    files, val = train_and_val(data)
    if val:
        by_split = {"train": files, "val": val}
        key = {"source": "text", "train": identify(files), "val": identify(val)}
        return Source(key, lambda split: _read_files(by_split[split]), _text_size(*files.values(), *val.values()))
    if len(files) == 1:
        return _one_file(*files.popitem(), data.val_fraction)
    return _by_name(files, {"source": "text"}, data.val_fraction)


def _by_name(
    files: dict[str, Path], key: dict[str, Any], val_fraction: float, skipped: Mapping[str, int] | None = None
) -> Source:
    """Each of several files a document, of which `val_fraction` are held out by their names: at least one, not all."""
    held = {name for name in files if held_out(name, val_fraction)}
    if not held:  # few files: one of them, and again one that its name decides
        held = {min(files, key=_digest)}
    if len(held) == len(files):
        held.remove(max(files, key=_digest))

    def documents(which: Split) -> Iterator[Document]:
        return _read_files({name: path for name, path in files.items() if (name in held) == (which == "val")})

    key = key | {"files": identify(files), "val_fraction": val_fraction}
    return Source(key, documents, _text_size(*files.values()), skipped or {})


def _one_file(name: str, path: Path, val_fraction: float) -> Source:
    """The first characters are a training document, the last `val_fraction` of them a validation document."""
    cut = int(sum(map(len, read_parts(path))) * (1 - val_fraction))

    def documents(which: Split) -> Iterator[Document]:
        position, first = 0, True
        for part in read_parts(path):
            middle = min(max(cut - position, 0), len(part))
            position += len(part)
            text = part[:middle] if which == "train" else part[middle:]
            if text:
                yield Document(f"{name} ({which})", text, first)
                first = False
            if which == "train" and position >= cut:
                return

    key = {"source": "text", "files": identify({name: path}), "val_fraction": val_fraction}
    return Source(key, documents, _text_size(path))


def _text_size(*paths: Path) -> int:
    """Bytes of the text in files; 0 = unknown."""
    return 0 if any(path.suffix in PACKED for path in paths) else sum(path.stat().st_size for path in paths)


def _read_files(files: dict[str, Path]) -> Iterator[Document]:
    for name, path in files.items():
        for index, part in enumerate(read_parts(path)):
            yield Document(name, part, first=index == 0)


def read_parts(path: Path) -> Iterator[str]:
    """The text of a file, unchanged, in parts of about BLOCK bytes that end before a newline wherever they can.

    Tokens never cross from a line into the newline after it (see `tokenizers`), so parts are tokenized as the whole.

    Raises:
      UserError: the file cannot be read, or is not UTF-8; names the byte (of the text, where the file is packed).
    """
    decoder = codecs.getincrementaldecoder("utf-8")()
    rest, offset, block = "", 0, b"-"
    try:
        with opened(path) as file:
            while block:
                block = file.read(BLOCK)
                offset += len(block)
                text = rest + decoder.decode(block, final=not block)
                cut = len(text[: text.rfind("\n") + 1].rstrip("\n")) if block else 0
                part, rest = (text[:cut], text[cut:]) if cut else (text, "")
                if part:
                    yield part
    except UnicodeDecodeError as error:
        at = offset - len(error.object) + error.start
        raise UserError(f"{path}: not UTF-8 at byte {at} ({error.reason}); allowed: UTF-8 text") from None


def parts_of(text: str) -> Iterator[str]:
    """A text in parts of at most BLOCK characters, so that no long one is tokenized at once."""
    while len(text) > BLOCK:
        cut = text.rfind("\n", 1, BLOCK)
        cut = cut if cut > 0 else BLOCK
        yield text[:cut]
        text = text[cut:]
    yield text


def array_hash(array: np.ndarray) -> str:
    """sha256 of a 1-D array; of a sample of blocks where it is larger than HASH_LIMIT."""
    digest = hashlib.sha256(f"{array.dtype.str} {array.size}".encode())
    step = BLOCK // array.itemsize
    starts = range(0, array.size, step)
    stride = -(-array.nbytes // HASH_LIMIT)
    for start in starts[::stride] if stride > 1 else starts:
        digest.update(array[start : start + step].tobytes())
    return digest.hexdigest()
