"""Reads nanoGPT's meta.pkl, which says which characters ids stand for.

It is a pickle, and unpickling runs whatever code a pickle names. So nothing is unpickled here: this module reads the
instructions one by one, and follows only those that make strings, integers and dicts of them. It refuses all others.
"""

import pickletools
from pathlib import Path
from typing import Any

from jaxlm.data.tokenizers.base import CharTokenizer

MAX_BYTES = 1 << 24
VALUES = ("BINUNICODE", "SHORT_BINUNICODE", "BININT", "BININT1", "BININT2")


def read_meta(path: Path) -> CharTokenizer | None:
    """Returns the tokenizer of a meta.pkl as nanoGPT's prepare.py writes it; None if it is something else."""
    try:
        itos = _follow(path.read_bytes()[:MAX_BYTES])["itos"]
        alphabet = [itos[i] for i in range(len(itos))]
        # A CharTokenizer sorts its characters, as nanoGPT does.
        known = all(type(c) is str and len(c) == 1 for c in alphabet) and alphabet == sorted(set(alphabet))
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return None
    return CharTokenizer(alphabet) if known and alphabet else None


def _follow(pickled: bytes) -> Any:
    """Returns the content of a pickle of dicts, strings and small integers. Raises ValueError, LookupError or TypeError
    if it holds anything else.
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
    raise ValueError("it does not end")
