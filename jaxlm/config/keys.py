"""The meaning of each key, read from the comments in schema.py, and the list of all keys for `--help`."""

import ast
import inspect
import io
import shlex
import textwrap
import tokenize
from typing import Any, get_args

from jaxlm.config import key_types, schema, sections

KINDS = {int: "whole number", float: "number", bool: "true, false", str: "text"}


def meanings() -> dict[str, str]:
    """The comment beside each key, or else the comment lines above it: {'model.d_model': 'width of ...', ...}."""
    source = inspect.getsource(schema)
    lines = [line.strip() for line in source.splitlines()]
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    comments = {t.start[0]: t.string.lstrip("# ").rstrip(".") for t in tokens if t.type == tokenize.COMMENT}
    prefixes = {f.type.__name__: f"{f.name}." for f in sections()} | {"Config": ""}
    found = {}
    for section in ast.parse(source).body:
        if not isinstance(section, ast.ClassDef) or section.name not in prefixes:
            continue
        for field in section.body:
            if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
                first = field.lineno
                while lines[first - 2].startswith("#"):
                    first -= 1
                above = " ".join(comments[i] for i in range(first, field.lineno))
                found[prefixes[section.name] + field.target.id] = comments.get(field.lineno, above)
    return {key: found.get(key, "") for key in key_types()}


def listing(defaults: dict[str, Any], width: int) -> str:
    """The list of all keys by section: KEY=DEFAULT, meaning and allowed values, in lines of at most `width`.

    Args:
      width: in characters; less than 40 counts as 40.
    """
    width = max(width, 40)
    lines = textwrap.wrap("keys, set with --config.KEY=VALUE and shown with the values of configs/base.py:", width)
    indent, section = " " * min(32, width // 3), None
    for (key, kind), meaning in zip(key_types().items(), meanings().values(), strict=True):
        if key.rpartition(".")[0] != section:
            section = key.rpartition(".")[0]
            lines.append("")
        left = f"  {key}={_shown(defaults[key])}" if key in defaults else f"  {key}"
        if len(left) >= len(indent):
            lines.append(left)
            left = ""
        lines += textwrap.wrap(
            f"{meaning} ({KINDS.get(kind) or ', '.join(get_args(kind))})",
            width,
            break_on_hyphens=False,
            initial_indent=left.ljust(len(indent)),
            subsequent_indent=indent,
        )
    return "\n".join(lines) + "\n"


def _shown(value: Any) -> str:
    """The value as it is typed in a shell."""
    if isinstance(value, bool):
        return str(value).lower()
    if not isinstance(value, str) or not value:
        return str(value)
    escaped = repr(value)[1:-1]
    return shlex.quote(value) if escaped == value else f"$'{escaped}'"
