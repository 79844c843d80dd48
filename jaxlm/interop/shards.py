"""Tensors in safetensors files, one file or several with an index, read one by one and written shard by shard."""

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from jaxlm.config import UserError, show

FILE, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARD = 2 * 10**9  # bytes of a file at most, unless one tensor is larger


class Tensors:
    """The tensors of a folder. Each is read when it is asked for, from a file that is open for that long: pages of
    files that stay open would stay in memory.

    Raises:
      UserError: the folder has no safetensors, or they are damaged.
    """

    def __init__(self, folder: Path):
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._path: dict[str, Path] = {}
        for path in _files(folder):
            with _opened(path) as file:
                for name in file.keys():  # noqa: SIM118, not a dict
                    self._path[name], self._shapes[name] = path, tuple(file.get_slice(name).get_shape())

    @property
    def names(self) -> set[str]:
        return set(self._path)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[name]

    def read(self, name: str) -> np.ndarray:
        with _opened(self._path[name]) as file:
            return file.get_tensor(name)


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    from safetensors import safe_open

    try:
        with safe_open(path, "np") as file:
            yield file
    except Exception as error:  # the library's own, or OSError
        raise UserError(f"{path}: unreadable ({' '.join(str(error).split())}); allowed: safetensors") from error


def _files(folder: Path) -> list[Path]:
    index = folder / INDEX
    if not index.is_file():
        if not (folder / FILE).is_file():
            raise UserError(f"{folder}: neither {FILE} nor {INDEX} in it; allowed: a model in safetensors")
        return [folder / FILE]
    try:
        names = sorted(set(json.loads(index.read_text("utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{index}: unreadable ({error}); allowed: an index with a weight_map") from error
    for name in names:
        if not isinstance(name, str) or Path(name).name != name or not (folder / name).is_file():
            raise UserError(f"{index}: names {show(name)}; allowed: files beside it")
    return [folder / name for name in names]


def write(folder: Path, tensors: Iterable[tuple[str, np.ndarray]], shard: int = SHARD) -> None:
    """Writes tensors to a folder, in files of at most `shard` bytes. Holds one file's tensors at a time."""
    from safetensors.numpy import save_file

    parts: list[dict[str, int]] = []  # names and bytes in each file
    for i, part in enumerate(_parted(tensors, shard), 1):
        save_file(part, folder / f"{i}.safetensors", metadata={"format": "pt"})
        parts.append({name: x.nbytes for name, x in part.items()})
        part.clear()  # before the next one is made
    if len(parts) == 1:
        (folder / "1.safetensors").rename(folder / FILE)
        return
    where = {}
    for i, part in enumerate(parts, 1):
        name = f"model-{i:05}-of-{len(parts):05}.safetensors"
        (folder / f"{i}.safetensors").rename(folder / name)
        where |= dict.fromkeys(part, name)
    total = sum(sum(part.values()) for part in parts)
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": where}, indent=2) + "\n")


def _parted(tensors: Iterable[tuple[str, np.ndarray]], shard: int) -> Iterator[dict[str, np.ndarray]]:
    part: dict[str, np.ndarray] = {}
    for name, x in tensors:
        if part and sum(y.nbytes for y in part.values()) + x.nbytes > shard:
            yield part
            part = {}
        part[name] = x
    yield part
