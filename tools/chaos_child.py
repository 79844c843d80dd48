"""The trainer with a fault: chaos.py runs it in place of `-m jaxlm.main`. CHAOS (JSON) says which fault:

- {"kill": "time", "seconds": 3.2}: SIGKILL that many seconds after the start
- {"kill": "place", "place": "evaluating", "seconds": 0.01}: that many seconds after the loop reaches the place
- {"kill": "step", "steps": 5, "seconds": 0.01}: that many seconds after the fifth step
- {"kill": "file", "kind": "save", "count": 7}: at that file operation of a kind (`store`, `save`, `delete`, `metrics`)
- with "most": 20, at the latest after that many steps
- {"fail": 30, "step": 5}: nothing can be written in the workdir for 30 s, from the 5th step on
- {"nan": [first, last]}: the loss of these batches is NaN
- {"flip": 20}: before the 20th step that this process makes, one bit of a weight changes on its last device; with
  several processes, in the last one
- {"hang": 20}: the data of the 20th batch never arrives
- {"count": true}: no fault; counts file operations

The trainer appends what happened to the file named in CHAOS_LOG, one JSON object per line.
"""

import atexit
import errno
import json
import os
import runpy
import signal
import sys
import threading
import time
from collections import Counter
from typing import Any
from unittest import mock

PLAN = json.loads(os.environ.get("CHAOS", "{}"))
WORKDIR = os.path.realpath(os.environ.get("CHAOS_WORKDIR", "."))
CACHE = os.path.realpath(os.environ.get("CHAOS_CACHE", "."))
WRITING = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate", "shutil.rmtree"}

counts: Counter[str] = Counter()


def place() -> str:
    distributed = sys.modules.get("jaxlm.host.distributed")
    return getattr(distributed, "loop_place", "importing")


def note(**fields: Any) -> None:
    with open(os.environ["CHAOS_LOG"], "a") as file:
        file.write(json.dumps(fields) + "\n")


def kill(what: str) -> None:
    note(killed=what, place=place())
    os.kill(os.getpid(), signal.SIGKILL)


def kind_of(event: str, args: tuple[Any, ...]) -> str | None:
    """Returns which of the trainer's files an operation changes; None if it changes none."""
    if event not in WRITING or (event == "open" and not args[2] & (os.O_WRONLY | os.O_RDWR)):
        return None
    if not isinstance(args[0], str | os.PathLike | bytes):
        return None
    path = os.fsdecode(args[0])
    if not os.path.isabs(path) and event in ("os.remove", "os.rmdir"):
        return "delete"  # rmtree gives paths relative to an open folder
    path = os.path.realpath(path)
    if (path + os.sep).startswith(CACHE + os.sep):
        return "store"
    if not (path + os.sep).startswith(WORKDIR + os.sep):
        return None
    if "metrics.jsonl" in path:
        return "metrics"
    if os.sep + "checkpoints" not in path:
        return "workdir"
    return "delete" if event in ("os.remove", "os.rmdir", "shutil.rmtree") else "save"


def hook(event: str, args: tuple[Any, ...]) -> None:
    if event not in WRITING:
        return
    kind = kind_of(event, args)
    if kind is None:
        return
    counts[kind] += 1
    if PLAN.get("kill") == "file" and PLAN["kind"] == kind and counts[kind] == PLAN["count"]:
        kill(f"{kind} ({event} {os.path.basename(os.fsdecode(args[0]))})")
    if failing() and kind in ("save", "delete", "metrics", "workdir"):
        counts["failed"] += 1
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), os.fsdecode(args[0]))


began: float | None = None  # time at which writing began to fail


def failing() -> bool:
    global began
    if "fail" not in PLAN:
        return False
    if began is None and (step() or 0) >= PLAN["step"]:
        began = time.monotonic()
    return began is not None and time.monotonic() - began < PLAN["fail"]


def step() -> int | None:
    """Returns the step that the loop has reached; None before the first."""
    words = place().replace(",", "").split()
    return int(words[1]) if words[0] == "step" else None


def wait_and_kill() -> None:
    began, first, there = time.monotonic(), None, None
    while True:
        now, at = time.monotonic(), step()
        first = at if first is None else first
        done = 0 if at is None or first is None else at - first
        reached_step = at is not None and done >= PLAN.get("steps", 0)
        reached_place = PLAN.get("place", "") in place()
        arrived = {"time": True, "place": reached_place, "step": reached_step, "file": False}[PLAN["kill"]]
        if arrived and there is None:
            there = began if PLAN["kill"] == "time" else now
        if done >= PLAN["most"] or (there is not None and now - there >= PLAN["seconds"]):
            kill(PLAN["kill"])
        time.sleep(0.001)


def poison(first: int, last: int) -> None:
    """Makes the loss of batches first ... last (counted from 1) NaN."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from jaxlm.data.order import TrainOrder
    from jaxlm.train import backward, pipeline

    mark, batches, loss = -2, TrainOrder.batches, backward.output_loss

    def marked(self: Any, begin: int, count: int, rows: slice = slice(None)) -> Any:
        found = batches(self, begin, count, rows)
        numbers = self.batch_number(np.arange(begin + 1, begin + count + 1))
        found["targets"][(numbers >= first) & (numbers <= last), 0, 0] = mark
        return found

    def poisoned(unembed: Any, weights: Any, x: Any, targets: Any, *more: Any) -> Any:
        bad = jnp.where(jnp.any(targets == mark), jnp.nan, 1.0)
        return jax.tree.map(lambda s: s * bad, loss(unembed, weights, x, targets, *more))

    mock.patch.object(TrainOrder, "batches", marked).start()
    backward.output_loss = pipeline.output_loss = poisoned


def flip(number: int) -> None:
    """Flips one bit of the first weight on the last device before step `number`."""
    import jax
    import numpy as np

    from jaxlm.train import step as train_step

    make = train_step.pmap_train_step

    def flipped(x: jax.Array) -> jax.Array:
        copies = [shard.data for shard in x.addressable_shards]
        last = np.array(copies[-1])
        last.view(np.uint8).reshape(-1)[2] ^= 0x10  # a high bit of the fraction
        copies[-1] = jax.device_put(last, copies[-1].device)
        return jax.make_array_from_single_device_arrays(x.shape, x.sharding, copies)

    def made(*args: Any) -> Any:
        program, calls = make(*args), 0

        def run(state: Any, batch: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == number and jax.process_index() == jax.process_count() - 1:
                leaves, tree = jax.tree.flatten(state.params)
                state = state._replace(params=tree.unflatten([flipped(leaves[0]), *leaves[1:]]))
            return program(state, batch)

        return run

    train_step.pmap_train_step = made


def hang(number: int) -> None:
    from jaxlm.train import loop as train

    on_devices = train.on_devices

    def stuck(batches: Any, *args: Any) -> Any:
        for i, batch in enumerate(on_devices(batches, *args), 1):
            if i == number:
                time.sleep(1e6)
            yield batch

    train.on_devices = stuck


def main() -> None:
    if "kill" in PLAN:
        threading.Thread(target=wait_and_kill, daemon=True).start()
    sys.addaudithook(hook)
    if "nan" in PLAN:
        poison(*PLAN["nan"])
    if "flip" in PLAN:
        flip(PLAN["flip"])
    if "hang" in PLAN:
        hang(PLAN["hang"])
    atexit.register(lambda: note(counts=counts))  # the trainer ends by os._exit after these handlers
    runpy.run_module("jaxlm.main", run_name="__main__")


if __name__ == "__main__":
    main()
