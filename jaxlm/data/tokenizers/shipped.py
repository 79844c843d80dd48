"""The files that a pretrained model ships beside its tokenizer: its chat template, and the names of its special tokens.

A saved tokenizer keeps them as they are, so later runs and other programs have the template too.
"""

import json
from pathlib import Path
from typing import Any

from jaxlm.config import UserError, show

CONFIG, SPECIALS, TEMPLATE = "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"
BESIDE = (CONFIG, SPECIALS, TEMPLATE)
# Variables of a chat template that hold the names of special tokens, as in `transformers`.
TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


def read_beside(folder: Path) -> dict[str, bytes]:
    """The contents of those of the files that are in a folder, by name."""
    return {name: (folder / name).read_bytes() for name in BESIDE if (folder / name).is_file()}


def write_beside(folder: Path, files: dict[str, bytes]) -> None:
    for name, content in files.items():
        (folder / name).write_bytes(content)


def chat_template(files: dict[str, bytes]) -> str:
    """The Jinja template among the files; "" if there is none.

    Raises:
      UserError: a file is unreadable, or has several templates and none is called default.
    """
    if TEMPLATE in files:
        try:
            return files[TEMPLATE].decode("utf-8")
        except UnicodeDecodeError as error:
            raise UserError(f"{TEMPLATE}: not UTF-8 at byte {error.start}; allowed: a Jinja template") from None
    found = _content(files, CONFIG).get("chat_template")
    if isinstance(found, list):
        named = {each.get("name"): each.get("template") for each in found if isinstance(each, dict)}
        if "default" not in named:
            raise UserError(f"{CONFIG}: its chat templates are {show(list(named))}; allowed: one called default")
        found = named["default"]
    if found is not None and not isinstance(found, str):
        raise UserError(f"{CONFIG}: chat_template is {show(found)}; allowed: a text")
    return found or ""


def token_names(files: dict[str, bytes]) -> dict[str, str]:
    """The names of special tokens among the files, by their variables in a template: {"bos_token": "<s>", ...}."""
    values = {**_content(files, SPECIALS), **_content(files, CONFIG)}
    names = {key: value["content"] if isinstance(value, dict) else value for key, value in values.items()
             if key in TOKENS and not (isinstance(value, dict) and "content" not in value)}  # fmt: skip
    return {key: name for key, name in names.items() if isinstance(name, str)}


def _content(files: dict[str, bytes], name: str) -> dict[str, Any]:
    try:
        content = json.loads(files.get(name, b"{}"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{name}: not JSON ({error}); allowed: the file as its model ships it") from None
    if not isinstance(content, dict):
        raise UserError(f"{name}: holds {type(content).__name__}; allowed: a JSON object")
    return content
