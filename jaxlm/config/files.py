"""Loads configurations from files: Python files, packaged configurations, and the config.json of a run."""

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
from jaxlm.config.overrides import apply_overrides, key_of, with_overrides
from jaxlm.config.paths import holds_checkpoints
from jaxlm.config.pretrained import brought_by, check_asked, keys_of, named_weights, updated, with_own_tokenizer
from jaxlm.config.validate import check_address, validate

BASE = configs.FOLDER / "base.py"


def load(path: str | Path, overrides: list[str] | None = None, workdir: Path | None = None) -> Config:
    """Returns the checked configuration of a file with command-line overrides.

    If `checkpoint.resume` names another run's weights, the model's keys and the tokenizer come from that run instead of
    the file, and a line on stderr names the model's keys that differ. A run that resumes in `workdir` takes them from
    its own config.json.

    Raises:
      UserError: the file or an override is wrong, or an override contradicts the weights.
    """
    return complete(load_file(Path(path)), overrides or [], workdir)


def complete(file: Config, overrides: list[str], workdir: Path | None) -> Config:
    """`load`, applied to a configuration that `load_file` or `unchecked` returned."""
    config = with_overrides(file, overrides)
    check_address("checkpoint.resume", config.checkpoint.resume)  # before any message repeats it
    weights = named_weights(config.checkpoint.resume)
    if weights is None:
        return validate(config)
    if workdir is not None and holds_checkpoints(workdir) and (workdir / "config.json").exists():
        return validate(with_overrides(updated(file, keys_of(load_file(workdir / "config.json"))), overrides))
    run, brought = _weights_of(weights.workdir, config.checkpoint.resume)
    asked = {key_of(argument) for argument in overrides if argument.startswith("--")}
    check_asked(config, brought, asked, run, weights.workdir)
    before = flatten(config)
    try:
        config = validate(with_overrides(updated(file, brought), overrides))
    except UserError as error:
        message = f"{error}; the model's keys are those of {weights.workdir}, whose weights checkpoint.resume takes"
        raise UserError(message) from error
    replaced = {
        k: v for k, v in flatten(config).items() if k in brought and v != before[k] and not k.startswith("data.")
    }
    if replaced:
        shown = ", ".join(f"{k}={v} (not {before[k]})" for k, v in replaced.items())
        print(f"checkpoint.resume: {shown}, as in {weights.workdir}", file=sys.stderr)
    return config


def _weights_of(workdir: Path, resume: str) -> tuple[Config, dict[str, Any]]:
    """The configuration of the run in a workdir, and the keys that its weights bring to another run."""
    path = workdir / "config.json"
    if not path.is_file():
        raise UserError(
            f"checkpoint.resume is '{resume}': no config.json in {workdir}; allowed: auto, never, or the "
            "workdir of a run, after which @STEP or @best may name a checkpoint"
        )
    saved = read_saved(path)
    check_vocab_size(saved, path)
    run = from_saved(saved["config"], str(path))[0]
    return run, brought_by(workdir, run, saved["vocab_size"])


def load_workdir(workdir: str | Path, overrides: list[str] | None = None) -> Config:
    """Returns the configuration that a run saved in its workdir, with command-line overrides.

    If the tokenizer that the configuration names is gone, the run's own copy takes its place.
    """
    path = Path(workdir) / "config.json"
    if not path.exists():
        raise UserError(f"--workdir {workdir}: no config.json there; allowed: the workdir of a run")
    config = with_own_tokenizer(read_config(path)[0], path.parent)
    return apply_overrides(config, overrides or [])


def check_decoder(where: str, config: Config, why: str) -> None:
    """Raises UserError if the model has an encoder.

    Args:
      where: names the run in the message.
      why: only a decoder will do.
    """
    if config.model.encoder_layers:
        raise UserError(f"{where}: model.encoder_layers is {config.model.encoder_layers}; allowed: 0, because {why}")


def from_dict(tree: dict[str, Any], where: str = "config.json") -> Config:
    """Returns the checked configuration of a nested dict, the inverse of `dataclasses.asdict`.

    Raises:
      UserError: a key is unknown or missing, or a value is wrong.
    """
    return validate(_build(tree, where))


def _build(tree: dict[str, Any], where: str) -> Config:
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

    return build(Config, tree, "")


def from_saved(tree: dict[str, Any], where: str) -> tuple[Config, dict[str, Any]]:
    """The configuration of a workdir, and the keys that jaxlm has added since it was saved, with their values.

    An added key gets the value with which the run behaves as before: from `config.BEFORE`, else from configs/base.py.
    These keys are added to `tree`, too.

    Raises:
      UserError: a key is unknown, a value is wrong, or a section is missing.
    """
    added = _add_keys(tree)
    try:
        config = from_dict(tree, where)
    except UserError as error:
        raise UserError(str(error) if where in str(error) else f"{where}: {error}") from error
    return config, {key: flatten(config)[key] for key in added}


def _add_keys(tree: dict[str, Any]) -> list[str]:
    added = []
    for key in key_types():
        *section, name = key.split(".")
        holder = tree.get(section[0]) if section else tree
        if isinstance(holder, dict) and name not in holder:
            holder[name] = BEFORE.get(key, flatten(load_file(BASE))[key])
            added.append(key)
    return added


def unchecked(tree: dict[str, Any], where: str) -> Config:
    """The configuration of a nested dict that may lack keys, like `from_saved` but without `validate`.

    Raises:
      UserError: a key is unknown, or a section is missing.
    """
    _add_keys(tree)
    return _build(tree, where)


def read_saved(path: Path) -> dict[str, Any]:
    """The content of a workdir's config.json.

    Raises:
      UserError: the file cannot be read, or a run did not write it.
    """
    try:
        saved = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: unreadable ({error}); allowed: the config.json of a run") from error
    if not isinstance(saved, dict) or not isinstance(saved.get("config"), dict):
        raise UserError(f"{path}: not the configuration of a run (it has no 'config')")
    return saved


def read_config(path: Path) -> tuple[Config, dict[str, Any]]:
    """`from_saved`, applied to a workdir's config.json."""
    return from_saved(read_saved(path)["config"], str(path))


def check_vocab_size(saved: dict[str, Any], path: Path) -> None:
    """Raises UserError unless the content of a config.json has a valid vocab_size."""
    found = saved.get("vocab_size")
    if type(found) is not int or not 1 <= found <= MAX_INT:
        raise UserError(f"{path}: vocab_size is {show(found)}; allowed: what a run wrote there")


def load_file(path: Path) -> Config:
    """Loads the configuration of a Python file's `get_config()`, of a run's config.json, or of a packaged name.

    Python files are not checked by `validate` yet.

    Raises:
      UserError: there is no such file, or it does not return a configuration.
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
    """The path of a packaged configuration. Raises UserError if none has that name."""
    path = configs.FOLDER / f"{name}.py"
    if len(name.parts) != 1 or not path.is_file():
        names = ", ".join(sorted(p.stem for p in configs.FOLDER.glob("[a-z]*.py")))
        raise UserError(f"--config {name}: no such file; allowed: a file, or one of {names}")
    return path


@contextmanager
def _importable(path: Path) -> Iterator[None]:
    """A context in which a configuration can import packaged ones and its own modules, from any current folder.

    The package `configs` is `jaxlm.configs`, plus the file's folder if that is named `configs`, too. sys.path starts
    with the parent of the file's folder.
    """
    # Copies, because another thread may be importing modules.
    root, before = str(path.resolve().parents[1]), {k: m for k, m in sys.modules.copy().items() if _is_configs(k)}
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
        for name in [k for k in sys.modules.copy() if _is_configs(k)]:
            del sys.modules[name]
        sys.modules.update(before)


def _is_configs(module: str) -> bool:
    return module == "configs" or module.startswith("configs.")
