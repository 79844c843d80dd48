"""Injects the faults of long runs into a run, and checks that nothing is lost.

    python tools/chaos.py --config configs/debug.py --workdir /tmp/chaos --config.steps=400

trains the configuration once undisturbed, and once more for each fault, each time in a new folder below --workdir:

- kill    kill -9, --kills times, at random moments: while the run imports, builds the token store, compiles, makes a
          step, evaluates, saves, deletes an old checkpoint
- term    SIGTERM, --stops times, at random moments of training; each time the run must end with 75, and then resume
- damage  the same; each time, a file of the newest checkpoint is truncated, zeroed, removed or has a bit flipped
- disk    for --outage seconds, nothing can be written in the workdir
- flip    a bit of a weight changes on one device; the run must name the device, end with 5, and then resume
- nan     batches with a loss of NaN, as many in a row as send the run back to a checkpoint
- hang    data that does not arrive; the run must say where it is, and end with 5

After the first five faults, metrics.jsonl, except for times, and all parameters must equal those of the undisturbed run
bit for bit. The last line of output is one JSON object; the exit code is 1 if a promise was broken.
"""

if __name__ == "__main__":  # before the slow imports, so that signals are handled during them
    from jaxlm.host import startup

    startup.tool("chaos")


import collections
import json
import os
import random
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jaxlm.config import UserError, cli, files
from jaxlm.config.paths import user_path
from jaxlm.host import runtime
from jaxlm.host.exit_codes import exit_code
from tools.chaos_bench import Bench, Broken

FAULTS = ("kill", "term", "damage", "disk", "flip", "nan", "hang")


def kill(bench: Bench, kills: int, stops: int, outage: float) -> str:
    killed = 0
    while killed < kills:
        process = bench.start("kill", _moment(bench))
        bench.end(process, 0, -signal.SIGKILL)
        killed += process.returncode != 0
        if process.returncode == 0:  # the run finished before that moment
            break
    bench.finish("kill", {}, 0)
    bench.same("kill")
    where = collections.Counter(_where(entry) for entry in bench.log("kill") if "killed" in entry)
    few = "" if killed == kills else f" (the run ended before the other {kills - killed})"
    return f"{killed} times{few}: " + ", ".join(f"{n} {what}" for what, n in where.most_common())


def _moment(bench: Bench) -> dict[str, Any]:
    """Draws a moment for the kill: a time, a place in the loop, or a file operation. It lies within the next two saves,
    so that a run is killed many times.
    """
    draw, steps = bench.draw, bench.config.steps
    every = bench.config.checkpoint.every_steps or steps
    kinds = [kind for kind in ("save", "save", "delete", "metrics") if bench.counts.get(kind)]
    how, most = draw.choice(["start", "compile", "step", "evaluate", *kinds]), {"most": 2 * every}
    if bench.counts.get("store") and len(bench.log("kill")) < 2:  # it is built once, at the start
        how = "store"
    if how == "start":
        return most | {"kill": "time", "seconds": draw.uniform(0, bench.startup)}
    if how == "compile":
        seconds = draw.uniform(0, bench.startup / 2)
        return most | {"kill": "place", "place": "before the first step", "seconds": seconds}
    if how == "evaluate":
        return most | {"kill": "place", "place": "evaluating", "seconds": draw.uniform(0, 0.05)}
    if how == "step":
        return most | {"kill": "step", "steps": draw.randrange(2 * every), "seconds": draw.uniform(0, 0.05)}
    saves = 1 + steps // every
    latest = {"store": bench.counts[how], "metrics": 4}.get(how, max(2, bench.counts[how] // saves))
    return most | {"kill": "file", "kind": how, "count": draw.randint(1, latest)}


def _where(entry: dict[str, Any]) -> str:
    """Says in a word what a run was doing when it was killed."""
    what, place = entry["killed"].split()[0], entry["place"]
    if what in ("store", "save", "delete", "metrics"):
        return {"store": "building the store", "save": "saving", "delete": "deleting", "metrics": "writing metrics"}[
            what
        ]
    if place.startswith("step"):
        return "evaluating" if "evaluating" in place else "in a step"
    return "importing" if place == "importing" else "before the first step"


def term(bench: Bench, kills: int, stops: int, outage: float) -> str:
    seconds = list(_stopped(bench, "term", stops))
    bench.finish("term", {}, 0)
    bench.same("term")
    return f"{len(seconds)} times, saved and ended within {max(seconds, default=0.0):.2f} s"


def _stopped(bench: Bench, name: str, stops: int) -> Iterator[float]:
    """Stops a run `stops` times, at random steps. Yields the seconds that each stop took."""
    steps = sorted(bench.draw.sample(range(1, bench.config.steps), min(stops, bench.config.steps - 1)))
    for step in steps:
        process = bench.start(name, {})
        if not bench.wait_for(process, lambda step=step: any(m["step"] >= step for m in bench.metrics(name))):
            bench.end(process, 0)
            return  # the run finished first
        time.sleep(bench.draw.uniform(0, 0.1))
        sent = time.monotonic()
        process.send_signal(signal.SIGTERM)
        bench.end(process, 75, 0)
        yield time.monotonic() - sent
        if process.returncode == 0:
            return


def damage(bench: Bench, kills: int, stops: int, outage: float) -> str:
    done: list[str] = []
    for _ in _stopped(bench, "damage", stops):
        newest = bench.folder / "damage/checkpoints" / str(bench.checkpoints("damage")[-1])
        done.append(_harm(newest, bench.draw))
        if newest.name == "0":
            break
    bench.finish("damage", {}, 0)
    bench.same("damage")
    aside = sum(".damaged" in p.name for p in (bench.folder / "damage/checkpoints").iterdir())
    kinds = collections.Counter(done)
    return f"{len(done)} files ({', '.join(f'{n} {kind}' for kind, n in kinds.items())}), {aside} checkpoints put aside"


def _harm(checkpoint: Path, draw: random.Random) -> str:
    """Damages a file of the parameters or of the training state that is not empty. Returns how."""
    files = [p for item in ("params", "train") for p in sorted((checkpoint / item).rglob("*")) if p.is_file()]
    path = draw.choice([p for p in files if p.stat().st_size and p.name != "commit_success.txt"])
    how, content = draw.choice(["cut short", "zeroed", "bit flipped", "removed"]), bytearray(path.read_bytes())
    if how == "removed":
        path.unlink()
        return how
    if how == "cut short":
        content = content[: draw.randrange(len(content))]
    elif how == "zeroed":
        content = bytearray(len(content))
    else:
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    path.write_bytes(content)
    return how


def disk(bench: Bench, kills: int, stops: int, outage: float) -> str:
    out, _ = bench.finish("disk", {"fail": outage, "step": bench.config.steps // 4}, 0)
    bench.same("disk")
    failed = bench.log("disk")[-1]["counts"].get("failed", 0)
    if not failed or "NOT" not in out:
        raise Broken(
            "nothing was written while the disk failed, or the run did not say so: use a longer run or --outage"
        )
    return f"{failed} operations failed in {outage:g} s, reported {out.count('NOT ')} times, and were repeated"


def flip(bench: Bench, kills: int, stops: int, outage: float) -> str:
    p = bench.config.parallel
    if (p.devices or os.cpu_count() or 1) <= p.pipeline * p.tensor or p.zero == 3:
        return "not tried: needs two devices that hold the same weights"
    _, error = bench.finish("flip", {"flip": bench.config.steps // 2}, 5)
    line = error.strip().splitlines()[-1]
    if "differ" not in line:
        raise Broken(f"it did not say which devices differ: {line}")
    bench.finish("flip", {}, 0)
    bench.same("flip")
    return f"reported: {line.removeprefix('jaxlm: ').split(';')[0]}; resumed from the previous checkpoint"


def nan(bench: Bench, kills: int, stops: int, outage: float) -> str:
    c, row = bench.config, bench.config.optim.max_skipped
    first = c.steps // 2
    if c.steps < 4 * row:
        raise UserError(f"steps is {c.steps}; allowed with the fault nan: at least {4 * row}")
    bench.finish("nan", {"nan": [first, first + row - 1]}, 0)
    returns = json.loads((bench.folder / "nan/returns.json").read_text())
    if [r["batches"] for r in returns] != [[first, first + row - 1]]:
        raise Broken(f"returns.json has {returns}")
    losses = [m["loss"] for m in bench.metrics("nan") if "loss" in m]
    if bench.metrics("nan")[-1]["step"] != c.steps or None in losses:
        raise Broken("it did not finish with finite losses")
    return f"batches {first} to {first + row - 1}: skipped {row} steps, went back to step {returns[0]['to']}, continued"


def hang(bench: Bench, kills: int, stops: int, outage: float) -> str:
    at, patience = bench.config.steps // 2, 2 * bench.startup  # allows for compiling, which must not count as hanging
    began = time.monotonic()
    keys = [f"--config.log.hang_seconds={patience:.1f}", "--config.log.hang_abort=true"]
    _, error = bench.finish("hang", {"hang": at}, 5, *keys)
    if "nothing has moved" not in error or "in stuck" not in error or f"step {at - 1}" not in error:
        raise Broken(f"it did not say where it hung: {error[-500:]}")
    return f"reported where, with stacks, and ended with 5 ({time.monotonic() - began:.0f} s in all)"


def main() -> int:
    parser = cli.Parser(
        description="Injects the faults of long runs into a run, and checks that nothing is lost.",
        allow_abbrev=False,
        epilog="--config.KEY=VALUE sets a key, as for training.",
    )
    parser.add_argument(
        "--config", required=True, metavar="FILE", help="a configuration whose run takes about a minute"
    )
    parser.add_argument("--workdir", required=True, metavar="DIR", help="a new folder for all runs")
    parser.add_argument(
        "--faults", default=",".join(FAULTS), metavar="A,B", help=f"faults to inject (default: {','.join(FAULTS)})"
    )
    parser.add_argument("--kills", type=int, default=50, help="number of kills (default: 50)")
    parser.add_argument("--stops", type=int, default=5, help="number of stops for term and for damage (default: 5)")
    parser.add_argument(
        "--outage", type=float, default=10.0, metavar="S", help="seconds for which disk fails (default: 10)"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the random moments (default: 0)")
    args, overrides = parser.parse_known_args()
    file, folder = user_path("--config", args.config), user_path("--workdir", args.workdir)
    config = files.load(file, overrides)
    names = [name.strip() for name in args.faults.split(",")]
    if wrong := [name for name in names if name not in FAULTS]:
        raise UserError(f"--faults has {wrong[0]!r}; allowed: {', '.join(FAULTS)}, separated by commas")
    for name in ("kills", "stops"):
        if not 1 <= getattr(args, name) <= 10_000:
            raise UserError(f"--{name} is {getattr(args, name)}; allowed: 1 to 10000")
    if not 0 < args.outage <= 3600:
        raise UserError(f"--outage is {args.outage}; allowed: more than 0, at most 3600")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"--workdir {folder}: a file, or a folder that is not empty; allowed: a new folder")
    folder.mkdir(parents=True, exist_ok=True)
    bench = Bench(config, ["--config", str(file), *overrides], folder.resolve(), random.Random(args.seed))

    began = time.monotonic()
    process = bench.start("whole", {"count": True})
    bench.wait_for(process, lambda: bool(bench.metrics("whole")))
    bench.startup = time.monotonic() - began
    try:
        bench.end(process, 0)
    except Broken as error:
        raise UserError(f"the undisturbed run: {' '.join(str(error).split())}") from None
    bench.seconds, bench.counts = time.monotonic() - began, bench.log("whole")[-1]["counts"]
    print(f"undisturbed · {bench.seconds:.1f} s, of which {bench.startup:.1f} until the first step", flush=True)
    held: dict[str, bool] = {}
    tests = {"kill": kill, "term": term, "damage": damage, "disk": disk, "flip": flip, "nan": nan, "hang": hang}
    for name in names:
        began = time.monotonic()
        try:
            held[name], detail = True, tests[name](bench, args.kills, args.stops, args.outage)
        except Broken as error:
            held[name], detail = False, " ".join(str(error).split())
        print(
            f"{name} · {'held' if held[name] else 'BROKEN'} · {detail} · {time.monotonic() - began:.0f} s", flush=True
        )
        if held[name]:
            shutil.rmtree(folder / name, ignore_errors=True)  # not there if it was not tried
            shutil.rmtree(folder / f"{name}-cache", ignore_errors=True)
    print(json.dumps({"held": held}))
    return 0 if all(held.values()) else 1


if __name__ == "__main__":
    runtime.leave(exit_code(main, "chaos"))
