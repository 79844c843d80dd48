"""What a compiled program's kernels read, write and multiply, and how often they run.

Each operand and result of a kernel counts once, as if caches were perfect inside a kernel and useless between kernels.
Of an operand that it only slices or gathers from, the slices count; of a result that it updates in place, the update.
"""

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

from jaxlm.plan.program import Instruction, Program, arrays_of, bytes_of
from jaxlm.train.loss_scale import SEARCH
from jaxlm.train.one_device import RUNS

# Operations that move nothing.
FREE = {"parameter", "get-tuple-element", "bitcast", "tuple", "constant", "after-all", "partition-id", "replica-id"}
FREE |= {"opt-barrier", "iota", "domain", "add-dependency"}
COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
SLICES = ("dynamic-slice", "slice", "gather")  # read only a part of their first operand
UPDATES = {"dynamic-update-slice": 1, "scatter": 2}  # change their first operand in place; the operand that they write
# Products of fused attention: queries with keys and weights with values; backward, five of cuDNN's and seven of
# Triton's, which computes scores and their gradients twice.
ATTENTION = {
    "fmhaSoftmaxBackward": 5,
    "fmhaScaleBiasSoftmaxBackward": 5,
    "fmha": 2,
    "mha_backward": 7,
    "mha_forward": 2,
}


class Kernel(NamedTuple):
    name: str
    op: str
    op_name: str  # what JAX calls it
    source: str  # file:line
    times: int  # per step
    bytes: float  # read and written in memory, each time
    flops: float  # of its products, each time


class Step(NamedTuple):
    """An instruction where the program runs it."""

    instruction: Instruction
    shapes: dict[str, str]  # of all names beside it
    times: int  # how often it runs in a step of training
    looped: bool  # whether that is in a loop


def walk(program: Program, computation: str = "", times: int = 1, looped: bool = False) -> Iterator[Step]:
    """Yields the kernels, the collectives, and the ends of asynchronous collectives, in order; those of a loop's body
    once.

    Of a conditional it follows the branch that is taken if the condition holds. The name may say how often that is
    (RUNS); otherwise it is each time.

    Raises:
      ValueError: a loop has an unknown number of iterations.
    """
    instructions = program.computations[computation or program.entry]
    shapes = {i.name: i.shape for i in instructions}
    for i in instructions:
        if i.op == "while":
            search = i.op_name.endswith(f"{SEARCH}/while")  # of float16, which mostly ends with the first scale
            yield from walk(program, i.body, times * (1 if search else i.trips), looped or not search)
        elif i.op in ("call", "conditional", "async-start"):
            known = re.search(rf"{RUNS}(\d+)", i.op_name) if i.op == "conditional" else None
            if often := int(known[1]) if known else times:
                yield from walk(program, i.called[0], often, looped)
        elif i.op not in FREE and (not i.op.endswith("-done") or i.op.startswith(COLLECTIVES)):
            yield Step(i, shapes, times, looped)


def kernel_of(program: Program, step: Step) -> Kernel:
    i = step.instruction
    return Kernel(
        name=i.name,
        op=i.op,
        op_name=program.name_of(i),
        source=program.source(i),
        times=step.times,
        bytes=moved(program, i, step.shapes),
        flops=products(program, i, step.shapes),
    )


def moved(program: Program, kernel: Instruction, shapes: dict[str, str]) -> float:
    """Bytes that a kernel reads and writes."""
    size = {name: bytes_of(shapes.get(name, "")) for name in kernel.operands}
    if kernel.op in SLICES:
        return 2 * bytes_of(kernel.shape)
    if kernel.op == "dynamic-update-slice":
        return 2 * size[kernel.operands[1]]
    if kernel.op != "fusion":
        return bytes_of(kernel.shape) + sum(size.values())
    inside = program.computations[kernel.called[0]]
    size_of = {i.name: bytes_of(i.shape) for i in inside}
    read: dict[str, float] = {}  # an operand that is passed twice is read once
    shares = needed(inside)
    for i in inside:
        if i.op == "parameter":
            outer = kernel.operands[int(i.rest.partition(")")[0])]
            read[outer] = max(read.get(outer, 0.0), shares[i.name] * size_of[i.name])
    written = bytes_of(kernel.shape)
    for i in inside:
        if i.op in UPDATES:
            update = size_of[i.operands[UPDATES[i.op]]]
            written -= size_of[i.name] - update
            if i.op == "scatter":  # which adds to the rows that are there
                read[i.name] = update
    return sum(read.values()) + max(written, 0)


def needed(inside: list[Instruction]) -> dict[str, float]:
    """{name: the share of an array that a kernel computes or reads}, from its result back to its operands."""
    elements = {i.name: math.prod(arrays_of(i.shape)[0][1]) if arrays_of(i.shape) else 0 for i in inside}
    shares = {i.name: float(i.is_root) for i in inside}
    for i in reversed(inside):
        for position, operand in enumerate(i.operands):
            share = shares[i.name]
            if position == 0 and i.op in SLICES:
                share *= elements[i.name] / elements[operand]
            elif position == 0 and i.op in UPDATES:
                share = 0.0  # it stays where it is
            shares[operand] = min(1.0, shares[operand] + share)
    return shares


def products(program: Program, kernel: Instruction, shapes: dict[str, str]) -> float:
    """Floating-point operations of a kernel's matrix products; of causal attention, those of the visible half."""
    if kernel.op == "dot":
        return _product(kernel, shapes, _numbers(r"lhs_contracting_dims=\{([\d,]*)\}", kernel.rest))
    if kernel.op == "custom-call":
        if attention := next((n for name, n in ATTENTION.items() if name in kernel.rest), 0):
            return _attention(kernel, shapes, attention)
        if "matmul" in kernel.rest or "gemm" in kernel.rest:
            return _product(kernel, shapes, _numbers(r'"lhs_contracting_dimensions": ?\[([^\]]*)\]', kernel.rest))
    if kernel.op == "fusion":
        inside = program.computations[kernel.called[0]]
        inner = {i.name: i.shape for i in inside}
        return sum(products(program, i, inner) for i in inside)
    return 0.0


def _numbers(pattern: str, text: str) -> list[int]:
    match = re.search(pattern, text)
    return [int(n) for n in re.findall(r"\d+", match[1])] if match else []


def _product(dot: Instruction, shapes: dict[str, str], contracted: list[int]) -> float:
    (_, result), *_ = arrays_of(dot.shape)
    (_, left), *_ = arrays_of(shapes[dot.operands[0]])
    return 2 * math.prod(result) * math.prod(left[d] for d in contracted)


def _attention(call: Instruction, shapes: dict[str, str], count: int) -> float:
    """Queries are `[B, T, H, C]` and keys `[B, S, H, C]`."""
    B, T, H, C = arrays_of(shapes[call.operands[0]])[0][1]
    S = arrays_of(shapes[call.operands[1]])[0][1][1]
    causal = "CAUSAL" in call.rest or "mha_" in call.rest or "Bias" in call.rest
    return 2 * B * T * S * H * C * count / (2 if causal else 1)
