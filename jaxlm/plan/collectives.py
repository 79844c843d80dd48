"""What a compiled program moves between devices."""

import math
import re
from typing import NamedTuple

from jaxlm.plan.kernels import COLLECTIVES, Step, walk
from jaxlm.plan.program import BITS, Instruction, Program, arrays_of
from jaxlm.train.one_device import ACTIVATIONS, CONTEXT, STAGES


class Collective(NamedTuple):
    kind: str
    dtypes: str
    size: int  # devices in a group
    bytes: float  # of the whole array that the devices share
    times: int  # per step
    where: str  # "loop of the backward pass", "backward pass", "loop", "elsewhere"
    name: str  # name of the operation in the program

    @property
    def direction(self) -> str:
        """The direction of the grid in which devices exchange: pipeline, context, tensor, or data (sync/grid.py)."""
        return next((d for name, d in DIRECTIONS.items() if name in self.name), "data")

    @property
    def sent(self) -> float:
        """Bytes that a device sends each time, with the algorithm that sends least."""
        return SENT[self.kind](self.size) * self.bytes


# {name of an exchange that stays within a replica: its direction}
DIRECTIONS = {ACTIVATIONS: "tensor", CONTEXT: "context", STAGES: "pipeline"}

# {kind: (devices of a group) -> bytes that a device sends for each byte of the whole array}
SENT = {
    "all-reduce": lambda n: 2 * (n - 1) / n,
    "reduce-scatter": lambda n: (n - 1) / n,
    "all-gather": lambda n: (n - 1) / n,
    "all-to-all": lambda n: (n - 1) / n,
    "collective-permute": lambda n: 1,
}


def collectives(program: Program) -> list[Collective]:
    """The collectives of a program, those in a loop's body once.

    Raises:
      ValueError: a loop has an unknown number of iterations.
    """
    return [read(s) for s in walk(program) if is_collective(s.instruction)]


def is_collective(i: Instruction) -> bool:
    """Whether an instruction is a collective, or the start of an asynchronous one."""
    return i.op.startswith(COLLECTIVES) and not i.op.endswith("-done")


def read(step: Step) -> Collective:
    """The collective that an instruction is."""
    i, _, times, looped = step
    kind = i.op.removesuffix("-start")
    arrays = arrays_of(i.shape)
    if i.op.endswith("-start") and kind != "all-reduce":
        arrays = arrays[len(arrays) // 2 :]  # the result of an asynchronous one begins with its operands
    total, n = sum(BITS[dtype] / 8 * math.prod(dims) for dtype, dims in arrays), _group_size(i.rest)
    if kind == "reduce-scatter":
        total *= n  # its result is one part
    backward = "transpose(" in i.op_name
    where = " of the ".join(["loop"] * looped + ["backward pass"] * backward) or "elsewhere"
    return Collective(kind, "+".join(sorted({dtype for dtype, _ in arrays})), n, total, times, where, i.op_name)


def _group_size(text: str) -> int:
    """Returns the devices in a group. XLA writes groups as lists, as [groups, size], or as named axes of a mesh."""
    if match := re.search(r"replica_groups=\{\{([\d,]+)\}", text):
        return len(match[1].split(","))
    if match := re.search(r"replica_groups=\[(\d+),(\d+)\]", text):
        return int(match[2])
    if match := re.search(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}", text):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", match[1]))
        axes = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", match[2])  # 'a', or a part of it: 'a':(before)size
        return math.prod(int(size or sizes[axis]) for axis, size in axes)
    if "source_target_pairs=" in text:
        return 2
    raise ValueError(f"a collective with unknown groups: {text.strip()[:200]}")
