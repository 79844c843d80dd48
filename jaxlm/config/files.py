"""Configurations in files: Python files, the packaged ones among them, and the config.json of runs."""

import dataclasses
import importlib.util
import json
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from jaxlm import configs
from jaxlm.config import BEFORE, MAX_INT, Config, UserError, flatten, key_types, sections, show
from jaxlm.config.hints import unknown_key
from jaxlm.config.validate import validate

BASE = configs.FOLDER / "base.py"


def from_dict(tree: dict[str, Any], where: str = "config.json") -> Config:
    """The configuration that `dataclasses.asdict` gave, checked.

    Raises:
      UserError: a key is unknown, missing, or of the wrong type.
    """

    def build(cls: Any, sub: Any, prefix: str) -> Any:
        names: dict[str, Any] = {f.name: f.type for f in dataclasses.fields(cls)}
        if not isinstance(sub, dict):
            raise UserError(f"{where}: '{prefix.rstrip('.')}' is {sub!r}; allowed: an object of keys")
        if extra := sorted(set(sub) - set(names)):
            raise unknown_key(prefix + extra[0], where)
        if missing := sorted(set(names) - set(sub)):
            raise UserError(f"{where}: key '{prefix}{missing[0]}' is missing")
        return cls(
            **{
                n: build(t, sub[n], f"{prefix}{n}.") if dataclasses.is_dataclass(t) else sub[n]
                for n, t in names.items()
            }
        )

    return validate(build(Config, tree, ""))


def from_saved(tree: dict[str, Any], where: str) -> tuple[Config, dict[str, Any]]:
    """The configuration in a workdir, and the keys that jaxlm has gained since it was saved.

    A new key takes the value with which the run goes on as before: that of `config.BEFORE`, else of configs/base.py.

    Raises:
      UserError: a key is unknown or of the wrong type, or a section is missing.
    """
    gained = {}
    for key in key_types():
        *section, name = key.split(".")
        holder = tree.get(section[0]) if section else tree
        if isinstance(holder, dict) and name not in holder:
            gained[key] = holder[name] = BEFORE.get(key, flatten(load_file(BASE))[key])
    try:
        config = from_dict(tree, where)
    except UserError as error:
        raise UserError(str(error) if where in str(error) else f"{where}: {error}") from error
    return config, {key: flatten(config)[key] for key in gained}


def read_saved(path: Path) -> dict[str, Any]:
    """What a workdir's config.json holds.

    Raises:
      UserError: it cannot be read, or is something else.
    """
    try:
        saved = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: unreadable ({error}); allowed: the config.json of a run") from error
    if not isinstance(saved, dict) or not isinstance(saved.get("config"), dict):
        raise UserError(f"{path}: not the configuration of a run (no 'config' in it)")
    return saved


def read_config(path: Path) -> tuple[Config, dict[str, Any]]:
    """`from_saved` of a workdir's config.json."""
    return from_saved(read_saved(path)["config"], str(path))


def check_vocab_size(saved: dict[str, Any], path: Path) -> None:
    """Raises UserError if the content of a config.json has no possible vocab_size."""
    found = saved.get("vocab_size")
    if type(found) is not int or not 1 <= found <= MAX_INT:
        raise UserError(f"{path}: vocab_size is {show(found)}; allowed: what a run wrote there")


def load_file(path: Path) -> Config:
    """The configuration that a file's `get_config()` returns, that a run's config.json holds, or that is packaged.

    Raises:
      UserError: there is no such file, or it does not give a configuration.
    """
    if not path.is_file():
        path = packaged(path)
    if path.suffix == ".json":
        return read_config(path)[0]
    spec = importlib.util.spec_from_file_location("jaxlm_user_config", path)
    if spec is None or spec.loader is None:
        raise UserError(f"--config {path}: allowed: a Python file (.py), or the config.json of a run")
    module = importlib.util.module_from_spec(spec)
    try:
        with _importable(path):
            spec.loader.exec_module(module)
            config = module.get_config()
    except UserError:
        raise
    except (Exception, SystemExit) as error:  # any error of the user's own code
        typo = re.fullmatch(r"'(\w+)' object has no attribute '(\w+)'.*", str(error))
        if isinstance(error, AttributeError) and typo:
            prefixes = {f.type.__name__: f"{f.name}." for f in sections()}
            raise unknown_key(prefixes.get(typo[1], "") + typo[2], f"--config {path}") from error
        raise UserError(f"--config {path}: {type(error).__name__}: {error}") from error
    if not isinstance(config, Config):
        raise UserError(f"--config {path}: get_config() returned {type(config).__name__}; allowed: jaxlm.config.Config")
    for field in sections():
        if not isinstance(section := getattr(config, field.name), field.type):
            raise UserError(
                f"--config {path}: {field.name} is {section!r}; allowed: jaxlm.config.{field.type.__name__}"
            )
    return config


def packaged(name: Path) -> Path:
    """The file of a packaged configuration. Raises UserError if there is none of that name."""
    path = configs.FOLDER / f"{name}.py"
    if len(name.parts) != 1 or not path.is_file():
        names = ", ".join(sorted(p.stem for p in configs.FOLDER.glob("[a-z]*.py")))
        raise UserError(f"--config {name}: no such file; allowed: a file, or one of {names}")
    return path


@contextmanager
def _importable(path: Path) -> Iterator[None]:
    """Within it, a configuration may import from packaged ones and from its own folders, wherever it is run.

    `configs` is `jaxlm.configs`, and besides the folder of the file, if it is called so.
    """
    root, before = str(path.resolve().parents[1]), {k: m for k, m in sys.modules.items() if _is_configs(k)}
    for name in before:
        del sys.modules[name]
    own = [str(path.resolve().parent)] if path.resolve().parent.name == "configs" else []
    configs.__path__[:] = [str(configs.FOLDER), *(folder for folder in own if folder != str(configs.FOLDER))]
    sys.modules["configs"] = configs
    sys.path.insert(0, root)
    try:
        yield
    finally:
        sys.path.remove(root)
        configs.__path__[:] = [str(configs.FOLDER)]
        for name in [k for k in sys.modules if _is_configs(k)]:
            del sys.modules[name]
        sys.modules.update(before)


def _is_configs(module: str) -> bool:
    return module == "configs" or module.startswith("configs.")
