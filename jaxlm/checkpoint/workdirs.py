"""The folder of a run: config.json, the lock, the tokenizer, and whether a configuration may continue in it."""

import dataclasses
import errno
import fcntl
import filecmp
import importlib.metadata
import itertools
import json
import os
import platform
import re
import shutil
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from jaxlm import __version__
from jaxlm.config import Config, UserError, changes, show
from jaxlm.config.files import check_vocab_size, read_config, read_saved
from jaxlm.config.paths import holds_checkpoints, steps_in
from jaxlm.data.order import VERSION, VERSIONS
from jaxlm.data.tokenizers.shipped import BESIDE
from jaxlm.host.durable import beside, write_whole
from jaxlm.host.temporary import temporary_folder

# All that a run writes in its workdir. It writes config.json first, which marks the folder as a run's.
FILES = ("config.json", "metrics.jsonl", "returns.json", "report.html", "wandb_id")
FOLDERS = ("checkpoints", "tokenizer", "tensorboard", "profile", "wandb")
LOCK = ".lock"


class Lock:
    """Held while a run writes in its workdir. The system frees it when the process ends, even by a crash."""

    def __init__(self) -> None:
        self._file: int | None = None

    def take(self, workdir: Path) -> None:
        """Makes the folder if it is missing. Raises UserError if another run holds the lock, or it is not writable."""
        if self._file is not None:
            return
        with _writing(workdir):
            workdir.mkdir(parents=True, exist_ok=True)
            file = os.open(workdir / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(file)
            raise UserError(f"--workdir {workdir}: another run is at work in it; allowed: one at a time") from None
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL):
                os.close(file)
                raise UserError(f"--workdir {workdir}: {LOCK} cannot be locked ({error.strerror})") from error
            # otherwise the file system has no locks
        self._file = file

    def free(self) -> None:
        if self._file is not None:
            os.close(self._file)
        self._file = None

    def __enter__(self) -> "Lock":
        return self

    def __exit__(self, *error: object) -> None:
        self.free()


def begun(workdir: Path) -> bool:
    """Whether the folder belongs to a run."""
    return (workdir / "config.json").exists()


def check(workdir: Path, config: Config) -> str | None:
    """Checks that this configuration may run in this folder. Writes nothing.

    Returns:
      What changed since the last run in the folder, as one line; None if nothing did, or there was no run.

    Raises:
      UserError: the folder is not writable, is not a workdir, or holds a run that this configuration contradicts.
    """
    existing = next(p for p in (workdir, *workdir.absolute().parents) if p.exists())
    if not existing.is_dir():
        raise UserError(f"--workdir {workdir}: {existing} is a file; allowed: a folder")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise UserError(f"--workdir {workdir}: {existing} is not writable; allowed: a folder that you may write to")
    path = workdir / "config.json"
    if not path.exists():
        _check_foreign(workdir)
        return None
    old, gained = read_config(path)
    _check_obstacles(workdir)
    read_facts(workdir)
    free, refused = changes(old, config)
    if holds_checkpoints(workdir):
        if refused:
            differs = ", ".join(f"{key} was {was!r} and is now {now!r}" for key, (was, now) in refused.items())
            raise UserError(
                f"--workdir {workdir}: {differs}; allowed: the same as before, or another workdir"
                " (checkpoint.resume=PATH takes weights from this one)"
            )
        if config.checkpoint.resume == "never":
            raise UserError(
                f"checkpoint.resume is 'never'; allowed: auto, since {workdir} holds checkpoints, or another workdir"
            )
    new = [f"{key} is new: {value!r}" for key, value in gained.items()]
    return ", ".join(new + [f"{k} {was!r} -> {now!r}" for k, (was, now) in (free | refused).items()]) or None


def with_given_steps(workdir: Path, config: Config) -> Config:
    """Returns the configuration with at most as many steps as the run in the workdir was given."""
    given = read_config(workdir / "config.json")[0].steps
    return dataclasses.replace(config, steps=min(config.steps, given))


def _check_foreign(workdir: Path) -> None:
    """Raises UserError if a folder that is not a workdir holds something that a run would overwrite."""
    for name in (*FILES, *FOLDERS, LOCK):
        path = workdir / name
        ours = name == LOCK and path.is_file() and not path.stat().st_size  # left by a run that was killed at its start
        if os.path.lexists(path) and not ours:
            raise UserError(
                f"--workdir {workdir}: holds {name} but no config.json of a run; allowed: a new folder or a run's own"
            )


def _check_obstacles(workdir: Path) -> None:
    """Raises UserError if a workdir has a file where a run writes a folder, or the reverse."""
    checkpoints = workdir / "checkpoints"
    steps = [checkpoints / str(step) for step in steps_in(checkpoints)]
    for path in (*(workdir / name for name in FOLDERS), *steps):
        if os.path.lexists(path) and not path.is_dir():
            raise UserError(f"{path}: is a file; allowed: a folder, as a run makes it, or nothing")
    for path in (workdir / name for name in FILES):
        if os.path.lexists(path) and not path.is_file():
            raise UserError(f"{path}: is not a file; allowed: a file, as a run makes it, or nothing")


def claim(workdir: Path, config: Config, facts: dict[str, Any], changed: str | None, lock: Lock) -> None:
    """Makes the folder, locks it, and writes config.json in it.

    Raises:
      UserError: the folder cannot be made or written, or another run has just begun in it.
    """
    path = workdir / "config.json"
    history = read_facts(workdir)["history"] if path.exists() else []
    if changed:
        history.append({"time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "changed": changed})
    content = {"config": dataclasses.asdict(config), "versions": _versions(), **facts, "history": history}
    with _writing(workdir):
        new = not path.exists()
        lock.take(workdir)
        if new and path.exists():
            raise UserError(f"--workdir {workdir}: another run began in it just now; allowed: one at a time")
        write_whole(path, json.dumps(content, indent=2) + "\n")


def put_aside(workdir: Path, damaged: Sequence[int]) -> None:
    """Renames damaged checkpoints to `<step>.damaged`, because their steps will be saved again.

    Also removes what a killed run left half deleted, and the returns.json of a run without checkpoints.
    """
    with _writing(workdir):
        for step in damaged:
            path = workdir / "checkpoints" / str(step)
            names = (path.with_name(f"{step}.damaged{i or ''}") for i in itertools.count())
            path.rename(next(name for name in names if not name.exists()))
        for path in (workdir / "checkpoints").glob(".*"):
            if re.fullmatch(r"\.\d+\.[0-9a-f]{16}", path.name):  # a killed run was deleting it
                shutil.rmtree(path)
        if not holds_checkpoints(workdir):
            (workdir / "returns.json").unlink(missing_ok=True)


def save_tokenizer(workdir: Path, tokenizer: Any) -> None:
    """Saves the tokenizer, if any, in a workdir. Replaces the one that a run without checkpoints left there.

    Raises:
      UserError: the folder is not writable.
    """
    folder = workdir / "tokenizer"
    with _writing(workdir):
        if folder.exists() and not holds_checkpoints(workdir):
            shutil.rmtree(folder)
        if tokenizer is None or folder.exists():
            return
        temporary = beside(folder)
        temporary.mkdir()
        tokenizer.save(temporary)
        temporary.rename(folder)


def holds_tokenizer(workdir: Path, tokenizer: Any) -> bool:
    """Whether the tokenizer in a workdir has the same files as this one, apart from those that decide no ids."""
    folder = workdir / "tokenizer"
    if tokenizer is None:
        return not folder.exists()
    with temporary_folder() as saved:
        tokenizer.save(saved)
        names = [name for name in os.listdir(saved) if name not in BESIDE]
        renamed = folder / "jaxlm_tokenizer.json"
        if renamed.name in names and not renamed.exists() and "tokenizer.json" not in names:
            (saved / renamed.name).rename(saved / "tokenizer.json")  # the name in older versions
            names = [name for name in os.listdir(saved) if name not in BESIDE]
        return filecmp.cmpfiles(saved, folder, names, shallow=False)[0] == names


@contextmanager
def _writing(workdir: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"--workdir {workdir}: {error.strerror}; allowed: a folder that you may write to") from error


def read_facts(workdir: Path) -> dict[str, Any]:
    """Returns the content of config.json, including the facts about the data.

    Raises:
      UserError: the file is not as `claim` wrote it.
    """
    path = workdir / "config.json"
    content = read_saved(path)
    check_vocab_size(content, path)
    for key, kind in (("data_fingerprint", str), ("history", list)):
        if type(content.get(key)) is not kind:
            raise UserError(f"{path}: {key} is {show(content.get(key))}; allowed: what a run wrote there")
    return content


def order_version(workdir: Path) -> int:
    """Returns the version of the data order: for a new run the newest, otherwise the one that the run began with.

    Raises:
      UserError: this jaxlm does not know the version.
    """
    if not holds_checkpoints(workdir):
        return VERSION
    found = read_facts(workdir).get("order", 1)  # older runs do not record it
    if found not in VERSIONS:
        raise UserError(f"{workdir / 'config.json'}: order is {found!r}; allowed: {', '.join(map(str, VERSIONS))}")
    return found


def _versions() -> dict[str, str | None]:
    packages = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint")
    installed = {name: importlib.metadata.version(name) for name in packages}
    return {"jaxlm": __version__, "python": platform.python_version(), **installed, "git_commit": _git_commit()}


def _git_commit() -> str | None:
    """Returns the commit of jaxlm's checkout, with `-dirty` if it has changes; None if this file is in no checkout."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        return None
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        return subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
