"""nanoGPT's meta.pkl, which says what characters ids stand for.

It is a pickle, and unpickling one runs whatever code it names. Here nothing is unpickled: its instructions are read one
by one, and only those that make texts, numbers and dicts of them are followed. Any other one makes it unreadable.
"""

import pickletools
from pathlib import Path
from typing import Any

from jaxlm.data.tokenizers.base import CharTokenizer

MAX_BYTES = 1 << 24
VALUES = ("BINUNICODE", "SHORT_BINUNICODE", "BININT", "BININT1", "BININT2")


def read_meta(path: Path) -> CharTokenizer | None:
    """The tokenizer of a meta.pkl as nanoGPT's prepare.py writes it; None where it is something else."""
    try:
        itos = _follow(path.read_bytes()[:MAX_BYTES])["itos"]
        alphabet = [itos[i] for i in range(len(itos))]
        # A CharTokenizer's characters are in order, as nanoGPT's are.
        known = all(type(c) is str and len(c) == 1 for c in alphabet) and alphabet == sorted(set(alphabet))
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return None
    return CharTokenizer(alphabet) if known and alphabet else None


def _follow(pickled: bytes) -> Any:
    """What a pickle of dicts, texts and small numbers holds. Raises ValueError, LookupError or TypeError if it is
    something else.
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
