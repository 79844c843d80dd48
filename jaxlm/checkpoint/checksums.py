"""Hashes of a checkpoint's files, written before the checkpoint becomes visible and compared before it is restored.

Each item of a checkpoint (a folder, such as `params`) has a `checksums.json`, which also names the items of the
checkpoint: `{"items": ["params", "train"], "files": {"d/3fe1…": [bytes, sha256], …}}`. Orbax's metadata file says that
these files exist: a checkpoint that has lost all of them is damaged, and not one of an older version without hashes.
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from jaxlm.host.durable import sync

NAME = "checksums.json"
ABOUT = "_CHECKPOINT_METADATA"  # Orbax's file; it holds the custom_metadata given to `CheckpointManager.save`
PROMISE = {"checksums": True}


def write(item: Path, items: Sequence[str]) -> None:
    """Adds the hashes of an item's files and flushes all to disk, because an older checkpoint is deleted next."""
    files = {str(p.relative_to(item)): p for p in sorted(item.rglob("*")) if p.is_file()}
    found = {name: [path.stat().st_size, _sha256(path)] for name, path in files.items()}
    (item / NAME).write_text(json.dumps({"items": list(items), "files": found}))
    for path in (*item.rglob("*"), item, item.parent):
        sync(path)


def damage(step: Path) -> str | None:
    """Returns what is wrong with the checkpoint in a folder, naming the file; None if it is whole.

    A checkpoint of an older version, without hashes and without the promise of any, counts as whole.

    Raises:
      OSError: the checkpoint cannot be read at present, which does not mean that it is damaged.
    """
    items = [p for p in step.iterdir() if (p / NAME).exists()] if step.is_dir() else []
    if not items:
        if not (step / "params").is_dir():
            return f"{step}: no params in it"
        return _broken_promise(step)
    try:
        wanted = {name: json.loads((step / name / NAME).read_text()) for name in _items(items[0])}
        for name, content in wanted.items():
            for file, (size, digest) in content["files"].items():
                path = step / name / file
                if ".." in path.parts or not path.is_relative_to(step):
                    raise ValueError("leads elsewhere")
                if path.stat().st_size != size:
                    return f"{path}: {path.stat().st_size} bytes instead of {size}"
                if _sha256(path) != digest:
                    return f"{path}: other content than was saved"
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
        return f"{error.filename}: {error.strerror}"
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return f"{step}: a {NAME} in it is damaged"
    return None


def _broken_promise(step: Path) -> str | None:
    """Returns what is wrong with a checkpoint without hashes; None if an older version wrote it."""
    try:
        about = json.loads((step / ABOUT).read_text())
        promised = about["custom_metadata"].get("checksums") if "custom_metadata" in about else None
    except FileNotFoundError:
        return f"{step}: neither {NAME} nor {ABOUT} in it"
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return f"{step / ABOUT}: damaged, and no {NAME} in {step}"
    return f"{step}: every {NAME} of it is gone" if promised else None


def _items(item: Path) -> list[str]:
    return json.loads((item / NAME).read_text())["items"]


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
