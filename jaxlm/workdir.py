"""The folder of a run: its configuration, and whether a command may go on in it."""

import dataclasses
import importlib.metadata
import json
import os
import platform
import subprocess
import time
from pathlib import Path
from typing import Any

from jaxlm.cli import from_dict
from jaxlm.config import Config, UserError, changes


def holds_checkpoints(workdir: Path) -> bool:
    """Whether a step was saved; a run that was killed before its first save leaves an empty folder."""
    folder = workdir / "checkpoints"
    return folder.is_dir() and any(path.name.isdigit() for path in folder.iterdir())


def check(workdir: Path, config: Config) -> str | None:
    """Whether this configuration may run in this folder. Writes nothing.

    Returns:
      What changed since the last run in it, as a line; None if nothing did, or there was none.

    Raises:
      UserError: it cannot be written, is not a workdir, or holds a run that this configuration would contradict.
    """
    existing = next(p for p in (workdir, *workdir.absolute().parents) if p.exists())
    if not existing.is_dir():
        raise UserError(f"--workdir {workdir}: {existing} is a file; allowed: a folder")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise UserError(f"--workdir {workdir}: {existing} is not writable; allowed: a folder that you may write to")
    path = workdir / "config.json"
    if not path.exists():
        if holds_checkpoints(workdir):
            raise UserError(
                f"--workdir {workdir}: holds checkpoints but no config.json; allowed: a new folder or a run's own"
            )
        return None
    old = from_dict(_read(path)["config"], str(path))
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
    return ", ".join(f"{k} {was!r} -> {now!r}" for k, (was, now) in (free | refused).items()) or None


def claim(workdir: Path, config: Config, facts: dict[str, Any], changed: str | None) -> None:
    """Makes the folder and writes config.json in it.

    Raises:
      UserError: the folder cannot be made or written.
    """
    path = workdir / "config.json"
    history = _read(path).get("history", []) if path.exists() else []
    if changed:
        history.append({"time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "changed": changed})
    content = {"config": dataclasses.asdict(config), "versions": _versions(), **facts, "history": history}
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(".tmp")
        temporary.write_text(json.dumps(content, indent=2) + "\n")
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"--workdir {workdir}: {error.strerror}; allowed: a folder that you may write to") from error


def read_facts(workdir: Path) -> dict[str, Any]:
    """The content of config.json, facts of the data included."""
    return _read(workdir / "config.json")


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
        if isinstance(content, dict) and "config" in content:
            return content
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: unreadable ({error}); allowed: the config.json of a run") from error
    raise UserError(f"{path}: not the configuration of a run")


def _versions() -> dict[str, str | None]:
    packages = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint")
    try:
        own = importlib.metadata.version("jaxlm")
    except importlib.metadata.PackageNotFoundError:  # run from a checkout that is not installed
        own = None
    installed = {name: importlib.metadata.version(name) for name in packages}
    return {"jaxlm": own, "python": platform.python_version(), **installed, "git_commit": _git_commit()}


def _git_commit() -> str | None:
    """Of the checkout that this file is in, with `-dirty` where it was changed; None where it is in none."""
    root = Path(__file__).parents[1]
    if not (root / ".git").exists():
        return None
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        return subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
