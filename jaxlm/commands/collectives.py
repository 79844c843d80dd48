"""Reads from the text of a compiled program what it moves between devices."""

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
BITS = {"pred": 8, "bf16": 16} | {f"{kind}{bits}": bits for kind in "su" for bits in (4, 8, 16, 32, 64)}
BITS |= {"f16": 16, "f32": 32, "f64": 64}

COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*-> .*\{$")
INSTRUCTION = re.compile(r"= (\(.*?\)|\S+) (" + "|".join(KINDS) + r"|while)(?:-start)?\(")
CALLED = re.compile(r"(?:body|condition|to_apply|calls|true_computation|false_computation)=%?([\w.\-]+)")


class Collective(NamedTuple):
    kind: str
    dtypes: str
    size: int  # devices in a group
    sent: float  # bytes that a device sends each time, with the algorithm that sends least
    times: int  # per step
    where: str  # "loop of the backward pass", "backward pass", "loop", "elsewhere"
    name: str  # name of the operation in the program


def collectives(text: str) -> list[Collective]:
    """Returns the collectives in a program's text, `compiled.as_text()`.

    In an all-reduce of B bytes, each of n devices sends 2 (n - 1) / n * B; in a reduce-scatter, all-gather or
    all-to-all, (n - 1) / n of the whole; in a permute, its whole operand.
    """
    computations, entry = _computations(text)
    return list(_walk(computations, entry, 1, False))


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
    found: dict[str, list[str]] = {}
    current, entry = "", ""
    for line in text.splitlines():
        if match := COMPUTATION.match(line):
            current = match[1]
            found[current] = []
            entry = current if line.startswith("ENTRY") else entry
        elif current:
            found[current].append(line)
    return found, entry


def _walk(computations: dict[str, list[str]], name: str, times: int, looped: bool) -> Iterator[Collective]:
    for line in computations[name]:
        match = INSTRUCTION.search(line)
        if match and match[2] != "while":
            yield _collective(line, match[1], match[2], times, looped)
            continue
        trips = 1
        if match:
            count = re.search(r'known_trip_count[^}]*"n":"(\d+)"', line)
            if count is None:
                raise ValueError(f"a loop with an unknown number of iterations: {line.strip()[:200]}")
            trips = int(count[1])
        for called in CALLED.findall(line):
            if called in computations:
                yield from _walk(computations, called, times * trips, looped or match is not None)


def _collective(line: str, shape: str, kind: str, times: int, looped: bool) -> Collective:
    arrays = [
        (dtype, [int(n) for n in dims.split(",") if n])
        for dtype, dims in re.findall(r"(\w+)\[([\d,]*)\]", shape)
        if dtype in BITS
    ]
    if "-start(" in line and kind in ("all-gather", "collective-permute"):
        arrays = arrays[len(arrays) // 2 :]  # the result of an asynchronous one begins with its operands
    total = sum(BITS[dtype] / 8 * math.prod(dims) for dtype, dims in arrays)
    n = _group_size(line)
    sent = {
        "all-reduce": 2 * (n - 1) / n * total,
        "reduce-scatter": (n - 1) * total,  # its result is one part
        "all-gather": (n - 1) / n * total,
        "all-to-all": (n - 1) / n * total,
        "collective-permute": total,
    }[kind]
    name = match[1] if (match := re.search(r'op_name="([^"]*)"', line)) else ""
    backward = "transpose(" in name
    where = (
        ("loop of the backward pass" if backward else "loop")
        if looped
        else "backward pass"
        if backward
        else "elsewhere"
    )
    return Collective(kind, "+".join(sorted({dtype for dtype, _ in arrays})), n, sent, times, where, name)


def _group_size(line: str) -> int:
    """Returns the devices in a group. XLA writes groups as lists, as [groups, size], or as named axes of a mesh."""
    if match := re.search(r"replica_groups=\{\{([\d,]+)\}", line):
        return len(match[1].split(","))
    if match := re.search(r"replica_groups=\[(\d+),(\d+)\]", line):
        return int(match[2])
    if match := re.search(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}", line):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", match[1]))
        axes = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", match[2])  # 'a', or a part of it: 'a':(before)size
        return math.prod(int(size or sizes[axis]) for axis, size in axes)
    if "source_target_pairs=" in line:
        return 2
    raise ValueError(f"a collective with unknown groups: {line.strip()[:200]}")
