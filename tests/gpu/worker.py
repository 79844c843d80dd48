"""Compiles steps for GPUs that are not there; `test_gpu_compile.py` runs it in an environment with JAX's CUDA plugin.

Reads a list of jobs from standard input, JSON: {config, overrides, hosts, per_host, vocab_size, device}. Prints a line
of JSON for each: what the compiled program holds, exchanges and runs.
"""

import json
import re
import sys
from pathlib import Path
from typing import Any

from jaxlm.config import files
from jaxlm.plan import compiled, devices
from jaxlm.plan.program import Program, arrays_of, parse

ROOT = Path(__file__).parents[2]


def float32_products(program: Program) -> list[str]:
    """The names of the matrix products with an operand in float32."""
    found = []
    for instructions in program.computations.values():
        shapes = {i.name: i.shape for i in instructions}
        dots = [i for i in instructions if i.op == "dot"]
        found += [i.op_name for i in dots if any(arrays_of(shapes[o])[0][0] == "f32" for o in i.operands)]
    return found


def examine(job: dict[str, Any]) -> dict[str, Any]:
    from jaxlm.commands.bench_comm import by_formula, purpose
    from jaxlm.plan.planning import rate
    from jaxlm.plan.times import step_time

    config = files.load(ROOT / "configs" / job["config"], [f"--config.{o}" for o in job["overrides"]])
    device, count = devices.find(job["device"]), job["hosts"] * job["per_host"]
    found = compiled.compile_step(config, compiled.devices(device, count, job["hosts"]), job["vocab_size"])
    program = parse(found.text)
    time = step_time(program, device, count, rate(config, device))
    exchanges = [
        {"purpose": purpose(e.collective), "kind": e.collective.kind, "where": e.collective.where,
         "sent": e.collective.sent * e.collective.times, "kernels": e.kernels}
        for e in time.exchanges
    ]  # fmt: skip
    return {
        "arguments": found.arguments,
        "in_place": found.in_place,
        "temporary": found.temporary,
        "moved": sum(k.times * k.bytes for k, _ in time.kernels),
        "computation_seconds": time.computation,
        "float32_products": float32_products(program),
        "calls": sorted(re.findall(r'custom_call_target="([^"]+)"', found.text)),
        "exchanges": exchanges,
        "formula": by_formula(config, job["vocab_size"], found) if count > 1 else {},
    }


def main() -> None:
    jobs = json.load(sys.stdin)
    first = jobs[0]
    config = files.load(ROOT / "configs" / first["config"], [f"--config.{o}" for o in first["overrides"]])
    compiled.configure(config, devices.find(first["device"]), first["hosts"] * first["per_host"])
    for job in jobs:
        print(json.dumps(examine(job)), flush=True)


if __name__ == "__main__":
    main()
