"""Reads the text of a compiled program, `compiled.as_text()`: instructions, shapes, and the lines they come from."""

import math
import re
from typing import NamedTuple

BITS = {"pred": 8, "bf16": 16, "f16": 16, "f32": 32, "f64": 64, "c64": 64, "c128": 128, "f8e4m3fn": 8, "f8e5m2": 8}
BITS |= {f"{kind}{bits}": bits for kind in "su" for bits in (4, 8, 16, 32, 64)}

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*-> .*\{$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([a-z][\w\-]*)\((.*)$")
_ARRAY = re.compile(r"\b([a-z]+[0-9a-z]*)\[([0-9,]*)\]")
_CALLED = re.compile(r"(?:body|condition|to_apply|calls|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")


class Instruction(NamedTuple):
    name: str
    shape: str  # such as bf16[12,768]{1,0}, or a tuple of these
    op: str
    operands: tuple[str, ...]  # names
    rest: str  # the text after the operation's name: operands and attributes
    is_root: bool

    @property
    def op_name(self) -> str:
        """What JAX calls the operation, such as jit(step)/layers/mlp/dot_general; "" if it does not say."""
        return match[1] if (match := re.search(r'op_name="([^"]*)"', self.rest)) else ""

    @property
    def called(self) -> list[str]:
        """The computations that it runs; of a conditional, first the one for a condition that holds."""
        names = _CALLED.findall(self.rest)
        if match := _BRANCHES.search(self.rest):
            names += [name.strip().lstrip("%") for name in match[1].split(",")][::-1]
        return names

    @property
    def body(self) -> str:
        """The computation that a loop repeats."""
        match = re.search(r"body=%?([\w.\-]+)", self.rest)
        assert match, self
        return match[1]

    @property
    def trips(self) -> int:
        """The iterations of a loop. Raises ValueError if the program does not say."""
        match = re.search(r'known_trip_count[^}]*"n":"(\d+)"', self.rest)
        if match is None:
            raise ValueError(f"a loop with an unknown number of iterations: {self.name} = {self.rest[:200]}")
        return int(match[1])


class Program(NamedTuple):
    computations: dict[str, list[Instruction]]
    entry: str
    frames: dict[int, str]  # stack frame -> file:line, of this package where a frame is in it

    def source(self, instruction: Instruction) -> str:
        """The line that an instruction comes from, or what it fuses; "" if JAX recorded none."""
        if match := re.search(r"stack_frame_id=(\d+)", instruction.rest):
            return self.frames.get(int(match[1]), "")
        inside = [i for name in instruction.called for i in reversed(self.computations.get(name, []))]
        return next((found for i in inside if (found := self.source(i))), "")

    def name_of(self, instruction: Instruction) -> str:
        """`op_name`, or that of something inside."""
        inside = [i for name in instruction.called for i in reversed(self.computations.get(name, []))]
        return instruction.op_name or next((i.op_name for i in inside if i.op_name), "")


def parse(text: str) -> Program:
    computations: dict[str, list[Instruction]] = {}
    current, entry = "", ""
    for line in text.splitlines():
        if match := _COMPUTATION.match(line):
            current = match[2]
            computations[current] = []
            entry = current if match[1] else entry
        elif current and (match := _INSTRUCTION.match(line)):
            root, name, shape, op, rest = match.groups()
            operands = tuple(re.findall(r"%([\w.\-]+)", rest.split("), ")[0]))
            computations[current].append(Instruction(name, shape, op, operands, rest, bool(root)))
    return Program(computations, entry, _frames(text))


def _frames(text: str) -> dict[int, str]:
    """Reads the tables at the top of the text: files, locations in them, and stack frames."""

    def table(name: str) -> dict[int, str]:
        match = re.search(rf"^{name}\n((?:\d+ .*\n)*)", text, re.MULTILINE)
        lines = match[1].splitlines() if match else []
        return {int(key): rest for key, _, rest in (line.partition(" ") for line in lines)}

    def number(key: str, row: str) -> int:
        match = re.search(rf"\b{key}=(\d+)", row)
        return int(match[1]) if match else 0

    files = {i: row.strip('"') for i, row in table("FileNames").items()}
    places = {
        i: f"{files.get(number('file_name_id', row), '')}:{number('line', row)}"
        for i, row in table("FileLocations").items()
    }
    frames = table("StackFrames")

    def own(i: int) -> str:
        """The place of the innermost frame in this package, else of the innermost one."""
        at = i
        while at in frames:
            place = places.get(number("file_location_id", frames[at]), "")
            if "/jaxlm/" in place:
                return place[place.rindex("/jaxlm/") + 1 :]
            at = number("parent_frame_id", frames[at]) - 1
        return places.get(number("file_location_id", frames[i]), "")

    return {i: own(i) for i in frames}


def arrays_of(shape: str) -> list[tuple[str, list[int]]]:
    """[(dtype, dimensions)] of a shape's arrays."""
    found = [(dtype, [int(d) for d in dims.split(",") if d]) for dtype, dims in _ARRAY.findall(shape)]
    return [(dtype, dims) for dtype, dims in found if dtype in BITS]


def bytes_of(shape: str) -> float:
    return sum(BITS[dtype] / 8 * math.prod(dims) for dtype, dims in arrays_of(shape))
