"""The source `tfds`: datasets of tensorflow_datasets with a text feature.

A child process fetches a dataset that is not on disk, and is killed when no more bytes arrive: without a network,
tensorflow_datasets would retry for minutes.
"""

import contextlib
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any, TypeVar

from jaxlm.config import DataConfig, UserError
from jaxlm.data.sources.documents import Document, Skipped, Source, Split, Unit, held_out, parts_of
from jaxlm.data.sources.files import MAX_UNITS, key_of
from jaxlm.data.tf_import import import_tensorflow

STALL_SECONDS = 60  # without a new byte, after which a download is given up
UNIT_EXAMPLES = 20_000  # examples of a unit, about

T = TypeVar("T")


def open_tfds(data: DataConfig) -> Source:
    """The documents of the dataset `data.tfds_name`, in the order of its files.

    Raises:
      UserError: the dataset, its split or its text feature is not available.
    """
    builder = _bounded(lambda: _builder(data), STALL_SECONDS, data)
    splits = _load(builder, data)  # {name: number of examples}
    features = list(builder.info.features or {})
    if data.text_key not in features:
        raise UserError(f"data.text_key is '{data.text_key}'; allowed with {data.tfds_name}: {', '.join(features)}")

    known = {n: [s.num_examples, s.num_bytes, s.shard_lengths] for n, s in builder.info.splits.items()}
    key = {
        "source": "tfds",
        "name": builder.info.full_name,
        "folder": str(builder.data_dir),
        "splits": known,
        "text_key": data.text_key,
        "split": data.split,
        "val_split": data.val_split,
        "val_fraction": None if data.val_split else data.val_fraction,
    }

    def units_of(split: str, which: Split | None) -> list[Unit]:
        count = min(MAX_UNITS, -(-splits[split] // UNIT_EXAMPLES)) or 1
        return [Unit(partial(_read, data, split, which, i, count)) for i in range(count)]

    def units() -> list[Unit]:
        if not data.val_split:
            return units_of(data.split, None)
        found = units_of(data.split, "train") + units_of(data.val_split, "val")
        if sum(splits.values()) > UNIT_EXAMPLES:
            return found
        # This process reads a single unit itself; several would go to processes that first import tensorflow, which
        # takes seconds.
        return [Unit(partial(_read_all, found))]

    return Source(f"{data.tfds_name} {data.split}", key, units, num_bytes=0)


def _read_all(units: list[Unit]) -> Iterator[Document | Skipped]:
    for unit in units:
        yield from unit.read()


def _read(data: DataConfig, split: str, which: Split | None, index: int, count: int) -> Iterator[Document]:
    """Yields part `index` of `count` of a split. If `which` is None, an example's place decides if it is held out."""
    import tensorflow_datasets as tfds

    builder = _builder(data)
    part: Any = split if count == 1 else tfds.even_splits(split, count)[index]
    before = sum(builder.info.splits[p].num_examples for p in tfds.even_splits(split, count)[:index]) if index else 0
    try:
        for place, example in enumerate(_examples(builder, part)[1](), before):
            name = f"{split}:{place}"
            drawn: Split = "val" if which is None and held_out(name, data.val_fraction) else "train"
            for i, piece in enumerate(parts_of(_text(example[data.text_key], name, data))):
                yield Document(name, piece, which or drawn, first=i == 0)
    except UserError:
        raise
    except Exception as error:  # tf.data and ArrayRecord raise exceptions of their own
        # Without the prefix {{…}} of TensorFlow's messages.
        reason = " ".join(str(error).split()).split("}} ")[-1] or type(error).__name__
        raise UserError(f"{builder.data_dir}: split {split} is unreadable ({reason})") from error


def _examples(builder: Any, split: Any) -> tuple[int, Callable[[], Iterator[dict[str, Any]]]]:
    """The number of examples of a split (0 if unknown), and a function that iterates over them."""
    import tensorflow_datasets as tfds

    import_tensorflow()
    if builder.info.file_format is tfds.core.FileFormat.ARRAY_RECORD:  # tf.data cannot read it
        source = builder.as_data_source(split=split)
        return len(source), lambda: iter(source)
    read_config = tfds.ReadConfig(interleave_cycle_length=1, try_autocache=False)
    dataset = builder.as_dataset(split=split, shuffle_files=False, read_config=read_config)
    return max(int(dataset.cardinality()), 0), dataset.as_numpy_iterator


def _data_dir(data: DataConfig) -> str | None:
    return os.path.expanduser(data.path) if data.path else None


def _builder(data: DataConfig) -> Any:
    try:
        import tensorflow_datasets as tfds
        from tensorflow_datasets.core import naming
    except ImportError as error:
        raise UserError(
            f"data.source is 'tfds', and tensorflow_datasets is not installed ({error}); "
            "allowed without it: stdlib, text, tokens, synthetic"
        ) from error
    try:
        _keep_to_own_features(tfds.features.FeatureConnector)
        if naming.parse_builder_name_kwargs(data.tfds_name)[0].namespace:
            raise ValueError("a dataset with a namespace runs code from outside tensorflow_datasets")
        return tfds.builder(data.tfds_name, data_dir=_data_dir(data), try_gcs=False)
    except Exception as error:  # whatever the dataset's own code or its hub raises
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise UserError(
            f"{key_of(data)} is '{data.tfds_name}': {reason}; allowed: a dataset of tensorflow_datasets, "
            "or one prepared under data.path"
        ) from error


@cache
def _keep_to_own_features(connector: Any) -> None:
    """Refuses classes from outside tensorflow_datasets, whose modules would be imported.

    A dataset's features.json names the Python classes that read it.
    """
    find = connector.cls_from_name

    def own(name: str) -> Any:
        if not str(name).startswith("tensorflow_datasets."):
            raise ValueError(f"its features.json requires {name}, which is not a class of tensorflow_datasets")
        return find(name)

    connector.cls_from_name = staticmethod(own)


def _load(builder: Any, data: DataConfig) -> dict[str, int]:
    """{split: number of examples, 0 if unknown}. Fetches the dataset if it is not on disk."""
    try:
        import_tensorflow()
    except ImportError as error:
        raise UserError(
            f"data.source is 'tfds', and tensorflow is not installed ({error}); "
            "allowed without it: stdlib, text, tokens, synthetic"
        ) from error

    def size(key: str, split: str) -> int:
        try:
            try:
                return _examples(builder, split)[0]
            except AssertionError:  # not prepared
                _download(builder, data)
                return _examples(builder, split)[0]
        except UserError:
            raise
        except (ValueError, KeyError) as error:
            raise UserError(
                f"data.{key} is '{split}'; allowed with {builder.info.full_name}: "
                f"{', '.join(builder.info.splits)}, and slices of them"
            ) from error

    splits = {data.split: size("split", data.split)}
    if data.val_split:
        splits[data.val_split] = size("val_split", data.val_split)
    return splits


def _download(builder: Any, data: DataConfig) -> None:
    """Runs `download_and_prepare` in a child process, which is killed when no byte arrives for STALL_SECONDS."""
    code = (
        "import sys, tensorflow_datasets as t; "
        "t.builder(sys.argv[1], data_dir=sys.argv[2], try_gcs=False).download_and_prepare()"
    )
    root = Path(_data_dir(data) or Path(builder.data_dir).parents[len(Path(builder.info.full_name).parts) - 1])
    print(f"fetching {data.tfds_name} into {root}", file=sys.stderr)
    with tempfile.TemporaryFile("w+") as errors:
        child = subprocess.Popen(
            [sys.executable, "-c", code, data.tfds_name, str(root)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=errors,
        )
        seen, since = -1, time.monotonic()
        try:
            while child.poll() is None and time.monotonic() - since < STALL_SECONDS:
                time.sleep(0.2)
                if (size := _bytes_under(root)) != seen:
                    seen, since = size, time.monotonic()
            stalled = child.poll() is None
        finally:
            child.kill()
            child.wait()
        errors.seek(0)
        last_line = (errors.read().splitlines() or ["no reason given"])[-1].strip()
    if stalled or child.returncode:
        reason = f"nothing arrived for {STALL_SECONDS} s" if stalled else last_line
        raise UserError(
            f"{key_of(data)} is '{data.tfds_name}', which is not in {root} and cannot be fetched ({reason}); allowed: "
            f"a dataset prepared there with tensorflow_datasets.builder(name, data_dir=...).download_and_prepare()"
        )


def _bytes_under(root: Path) -> int:
    total = 0
    for folder, _, names in os.walk(root):
        for name in names:
            with contextlib.suppress(OSError):  # the file was renamed or removed meanwhile
                total += os.path.getsize(os.path.join(folder, name))
    return total


def _bounded(function: Callable[[], T], seconds: float, data: DataConfig) -> T:
    """Returns or raises what the function does; raises UserError after `seconds`: it may wait for a network."""
    result: list[T] = []
    raised: list[BaseException] = []

    def work() -> None:
        try:
            result.append(function())
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(seconds)
    if raised:
        raise raised[0]
    if not result:
        raise UserError(
            f"{key_of(data)} is '{data.tfds_name}': no answer in {seconds} s; allowed: a dataset that is "
            "prepared under data.path"
        )
    return result[0]


def _text(value: bytes, name: str, data: DataConfig) -> str:
    if not isinstance(value, bytes):
        kind = type(value).__name__
        raise UserError(f"data.text_key is '{data.text_key}', which holds {kind}; allowed: a text feature")
    try:
        return value.decode()
    except UnicodeDecodeError as error:
        raise UserError(f"{data.tfds_name} {name}: not UTF-8 at byte {error.start}; allowed: UTF-8 text") from None
