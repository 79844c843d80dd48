"""Generates files that are damaged in many ways, and checks that a reader reads or refuses each of them."""

import copy
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jaxlm.config import Config, UserError
from tests.corpora import make_config

RECORDS = [
    {
        "text": f"text {i} 漢字",
        "doc": {"text": "a"},
        "prompt": "p",
        "response": f"answer {i}",
        "number": i,
        "messages": [{"role": "user", "content": f"question {i}"}, {"role": "assistant", "content": f"answer {i}"}],
    }
    for i in range(30)
]


def fuzz_config(folder: Path) -> Config:
    config = make_config(folder)
    config.data.val_fraction, config.batch_size = 0.2, 4
    return config


def fuzz(cases: st.SearchStrategy[Any], read: Callable[[Any], object], max_examples: int) -> None:
    """Checks that `read` accepts each case or refuses it with a UserError, and that both happen."""
    seen = Counter()

    @settings(
        max_examples=max_examples,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )
    @given(cases)
    def check(case: Any) -> None:
        try:
            read(case)
            seen["read"] += 1
        except UserError as error:
            assert str(error).split(), "the message is empty"
            seen["refused"] += 1

    check()
    assert seen["read"] and seen["refused"]


@st.composite
def damaged(draw: Any, seeds: list[bytes]) -> bytes:
    """Draws bytes with flipped bits, or overwritten, removed, inserted, repeated, moved or cut; or random bytes."""
    data = bytearray(draw(st.sampled_from(seeds)))
    at = st.integers(0, 63) | st.integers(0, max(len(data), 1))
    for _ in range(draw(st.sampled_from([1, 1, 1, 2, 4]))):
        i, j, n = draw(at), draw(at), draw(st.sampled_from([1, 2, 4, 8, 64]))
        how = draw(st.sampled_from(["flip", "fill", "remove", "insert", "repeat", "move", "end", "any"]))
        if how == "flip" and i < len(data):
            data[i] ^= 1 << (j % 8)
        elif how == "fill":
            data[i : i + n] = bytes([draw(st.sampled_from([0, 1, 0x7F, 0x80, 0xFF]))]) * len(data[i : i + n])
        elif how == "remove":
            del data[i : i + n]
        elif how == "insert":
            data[i:i] = draw(st.binary(min_size=1, max_size=8))
        elif how == "repeat":
            data[i:i] = data[j : j + n]
        elif how == "move":
            data[i : i + n] = data[j : j + n]
        elif how == "end":
            del data[i:]
        elif how == "any" and draw(st.integers(0, 4)) == 0:
            data = bytearray(draw(st.binary(max_size=300)))
    return bytes(data)


DEEP, LONG = "of any depth", "of many digits"  # placeholders for values that json.dumps cannot write
ATOMS = st.sampled_from([
    None, True, False, 0, -1, 1, 2, 257, 2**31, 2**32 - 1, 2**63, 2**64, -(2**63), 10**400, 0.5, -0.0, 257.0, 1e308,
    float("nan"), float("inf"), "", "a", "\0", "\ud800", "\n", "../../x", "/etc/passwd", "x" * 500, DEEP, LONG, [], {},
    "BPE", "Unigram", "WordPiece", "Sequence", "Split", "Metaspace", "ByteLevel", "bytes", "chars", "sentencepiece",
    "hf",
])  # fmt: skip
VALUES = ATOMS | st.text(max_size=5) | st.integers() | st.lists(ATOMS, max_size=3) | st.dictionaries(st.text(), ATOMS)


@st.composite
def changed(draw: Any, trees: list[Any]) -> bytes:
    """Draws JSON with values replaced by values of any type or by each other, and keys removed, renamed or added."""
    tree = {"": copy.deepcopy(draw(st.sampled_from(trees)))}
    for _ in range(draw(st.sampled_from([1, 1, 2, 3]))):
        places = [(tree, "")]
        while draw(st.integers(0, 5)) and (inside := _items(places[-1][0][places[-1][1]])):
            places.append((places[-1][0][places[-1][1]], draw(st.sampled_from(inside))))
        holder, key = places[-1]
        how = draw(st.sampled_from(["replace", "replace", "remove", "copy", "repeat", "rename", "number"]))
        if how == "remove" and len(places) > 1:
            del holder[key]
        elif how == "copy":
            source, name = draw(st.sampled_from(places))
            holder[key] = copy.deepcopy(source[name])
        elif how == "repeat" and isinstance(holder, list):
            holder.append(copy.deepcopy(holder[key]))
        elif how == "rename" and isinstance(holder, dict) and len(places) > 1:
            holder[draw(st.text(max_size=3))] = holder.pop(key)
        elif how == "number" and type(holder[key]) is int:
            holder[key] = draw(
                st.sampled_from([-holder[key], holder[key] + 1, holder[key] * 10**9, float(holder[key] % 2**1000)])
            )
        else:
            holder[key] = draw(VALUES)
    text = json.dumps(tree[""])
    return text.replace(f'"{DEEP}"', "[" * 9999 + "]" * 9999).replace(f'"{LONG}"', "9" * 5000).encode()


def _items(value: Any) -> list[Any]:
    """Returns the keys of an object, or some indices of a list."""
    if isinstance(value, list):
        return sorted({0, 1, 2, len(value) // 2, len(value) - 1} & set(range(len(value))))
    return [key for key in value if key] if isinstance(value, dict) else []
