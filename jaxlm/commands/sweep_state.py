"""The folder of a sweep: sweep.json with its base configuration, its points and how each ended.

Several processes may work on one sweep. Each holds the lock of sweep.json while it changes the file, and the lock of a
point's workdir while it trains that point.
"""

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jaxlm.checkpoint import workdirs
from jaxlm.config import Config, UserError, files, flatten, grid, show
from jaxlm.config.paths import holds_checkpoints
from jaxlm.host import runtime
from jaxlm.host.durable import write_whole
from jaxlm.host.startup import STOPPED

NAME, LOCK = "sweep.json", ".sweep.lock"
OURS = ".sweep."  # starts the names of the lock, and of a sweep.json that is being written
LONGEST = 120  # characters of a folder's name
FAILED = ("failed", "diverged")  # states
AGAIN = (STOPPED, 5)  # exit codes after which the same command continues a run


@dataclasses.dataclass
class Run:
    """A point of the sweep."""

    name: str  # of its folder
    values: grid.Point
    exit: int | None = None  # its last exit code, if it has one
    error: str = ""  # the line that came with it


@dataclasses.dataclass
class Sweep:
    folder: Path
    base: Config  # not checked: only the points must be possible
    grids: list[list[str]]  # as they were given
    runs: list[Run]

    def workdir(self, run: Run) -> Path:
        return self.folder / run.name

    def config(self, run: Run) -> Config:
        """Raises UserError if the point is impossible."""
        config = files.complete(self.base, grid.overrides(run.values), self.workdir(run))
        runtime.check_batch(config, config.parallel.devices, 1)
        return config

    def grid_keys(self) -> list[str]:
        """The keys of all grids."""
        return list(dict.fromkeys(key for run in self.runs for key in run.values))

    def status(self, run: Run) -> str:
        """`done`, `running`, `diverged`, `failed`, `stopped` or `waiting`. A point without a folder waits."""
        workdir = self.workdir(run)
        if _busy(workdir):
            return "running"
        if run.exit == 0 and workdirs.begun(workdir):
            return "done"
        if run.exit not in (None, 0, *AGAIN) and workdir.exists():
            return "diverged" if run.exit == 3 else "failed"
        return "stopped" if holds_checkpoints(workdir) else "waiting"


def _busy(workdir: Path) -> bool:
    """Whether a process trains in the folder."""
    if not (workdir / workdirs.LOCK).exists():
        return False
    try:
        with workdirs.Lock() as lock:
            lock.take(workdir)
    except UserError:
        return True
    return False


def read(folder: Path) -> Sweep:
    """Raises UserError if there is no sweep in the folder, or its file is damaged."""
    path = folder / NAME
    if not path.exists():
        raise UserError(f"--workdir {folder}: no {NAME} there; allowed: the folder of a sweep")
    allowed = "allowed: what jaxlm sweep wrote there"
    try:
        saved = json.loads(path.read_text("utf-8"))
        runs = [Run(**run) for run in saved["points"]]
        grids, base = saved["grids"], saved["config"]
        if not isinstance(base, dict) or not all(isinstance(run.name, str) and {*run.values} for run in runs):
            raise ValueError("config or points are wrong")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{path}: unreadable ({type(error).__name__}: {error}); {allowed}") from error
    return Sweep(folder, files.unchecked(base, str(path)), grids, runs)


def planned(folder: Path, base: Config | None, arguments: list[str]) -> tuple[Sweep, bool]:
    """The sweep in a folder with the points of a further grid, all of them checked. Writes nothing.

    Args:
      base: the configuration that the command line gives; None for the sweep's own.
      arguments: of `--grid`; none for no further points.

    Returns:
      The sweep, and whether it differs from what the folder holds.

    Raises:
      UserError: a point is impossible, the folder holds something else, or its sweep has another base.
    """
    if (folder / NAME).exists():
        sweep = read(folder)
        if base is not None:
            _check_same(sweep, base)
    else:
        if base is None or not arguments:
            raise UserError(f"--workdir {folder}: no {NAME} there; allowed without a sweep: --config and --grid")
        _check_new(folder)
        sweep = Sweep(folder, base, [], [])
    known = {_identity(sweep.config(run)) for run in sweep.runs} if arguments else set()
    before = len(sweep.runs)
    for values in grid.points(arguments) if arguments else []:
        run = Run(folder_name(values), values)
        identity = _identity(_checked(sweep, run))
        if identity not in known:  # a point of an earlier grid may be the same with fewer keys
            known.add(identity)
            sweep.runs.append(run)
    new = len(sweep.runs) > before
    if new:
        sweep.grids.append(arguments)
    return sweep, new


def _check_same(sweep: Sweep, base: Config) -> None:
    was, now = flatten(sweep.base), flatten(base)
    if differs := ", ".join(f"{key} was {was[key]!r} and is now {now[key]!r}" for key in was if was[key] != now[key]):
        raise UserError(f"--workdir {sweep.folder}: {differs}; allowed: the same as before, or another folder")


def _check_new(folder: Path) -> None:
    if folder.exists() and (not folder.is_dir() or any(not path.name.startswith(OURS) for path in folder.iterdir())):
        raise UserError(f"--workdir {folder}: is there and no sweep; allowed: a new folder, or a sweep's own")


def _checked(sweep: Sweep, run: Run) -> Config:
    try:
        config = sweep.config(run)
        workdirs.check(sweep.workdir(run), config)
    except UserError as error:
        raise UserError(f"point {grid.name_of(run.values)}: {error}") from error
    return config


def _identity(config: Config) -> str:
    return json.dumps(flatten(config))


def folder_name(values: grid.Point) -> str:
    """`optim.lr=1e-4,seed=0`. A name that a folder cannot have, or that is awkward in a shell, ends in a hash."""
    plain = grid.name_of(values, ",")
    safe = re.sub(r"[^A-Za-z0-9.,=_+-]+", "-", plain)[:LONGEST]
    return safe if safe == plain else f"{safe}-{hashlib.sha256(plain.encode()).hexdigest()[:8]}"


def opened(folder: Path, base: Config | None, arguments: list[str]) -> Sweep:
    """`planned`, and written if it is new."""
    sweep, new = planned(folder, base, arguments)
    if new:
        folder.mkdir(parents=True, exist_ok=True)
        with _locked(folder):
            sweep, _ = planned(folder, base, arguments)  # another command may just have written it
            _write(sweep)
    return sweep


def record(folder: Path, index: int, code: int, error: str = "") -> None:
    """Notes how a point ended."""
    with _locked(folder):
        sweep = read(folder)
        run = sweep.runs[index]
        if error or run.exit != code:
            run.exit, run.error = code, error
            _write(sweep)


def _write(sweep: Sweep) -> None:
    content: dict[str, Any] = {"config": dataclasses.asdict(sweep.base), "grids": sweep.grids}
    content["points"] = [dataclasses.asdict(run) for run in sweep.runs]
    write_whole(sweep.folder / NAME, json.dumps(content, indent=2) + "\n")


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """A context that one process enters at a time, where the file system has locks."""
    file = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
    finally:
        os.close(file)


def check_index(sweep: Sweep, index: int) -> None:
    if not 0 <= index < len(sweep.runs):
        raise UserError(f"--point is {show(index)}; allowed: 0 to {len(sweep.runs) - 1}, the points of {sweep.folder}")
