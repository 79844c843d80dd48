"""Reads nanoGPT's meta.pkl, the table of the characters that ids stand for.

The file is a pickle, and unpickling runs whatever code it names. Nothing is unpickled here: the pickle's instructions
are read one by one, and only those that make texts, numbers and dicts of them are followed. Any other instruction makes
the file unreadable.
"""

import pickletools
from pathlib import Path
from typing import Any

from jaxlm.data.tokenizers.base import CharTokenizer

MAX_BYTES = 1 << 24
VALUES = ("BINUNICODE", "SHORT_BINUNICODE", "BININT", "BININT1", "BININT2")


def read_meta(path: Path) -> CharTokenizer | None:
    """The tokenizer of a meta.pkl that nanoGPT's prepare.py wrote; None if the file holds something else."""
    try:
        itos = _follow(path.read_bytes()[:MAX_BYTES])["itos"]
        alphabet = [itos[i] for i in range(len(itos))]
        # A CharTokenizer sorts its characters, as nanoGPT does; in another order the ids would differ.
        known = all(type(c) is str and len(c) == 1 for c in alphabet) and alphabet == sorted(set(alphabet))
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return None
    return CharTokenizer(alphabet) if known and alphabet else None


def _follow(pickled: bytes) -> Any:
    """The value of a pickle of dicts, texts and small numbers. Raises ValueError, LookupError, TypeError or
    AttributeError if the pickle holds anything else.
    """
    stack: list[Any] = []
    memo: dict[int, Any] = {}
    mark = object()
    for instruction, argument, _ in pickletools.genops(pickled):
        name = instruction.name
        if name in VALUES:
            stack.append(argument)
        elif name == "EMPTY_DICT":
            stack.append({})
        elif name == "MARK":
            stack.append(mark)
        elif name in ("SETITEM", "SETITEMS"):
            at = len(stack) - 2 if name == "SETITEM" else len(stack) - stack[::-1].index(mark)
            items = stack[at:]
            del stack[at if name == "SETITEM" else at - 1 :]
            stack[-1].update(zip(items[::2], items[1::2], strict=True))
        elif name in ("MEMOIZE", "BINPUT", "LONG_BINPUT"):
            memo[len(memo) if name == "MEMOIZE" else int(argument or 0)] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(memo[int(argument or 0)])
        elif name == "STOP":
            return stack.pop()
        elif name not in ("PROTO", "FRAME"):
            raise ValueError(name)
    raise ValueError("the pickle does not end")
