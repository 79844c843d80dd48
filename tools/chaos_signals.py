"""Sends signals to every command at random moments, and checks how the command ends.

Each signal goes to a new command, at most --within seconds after its start: SIGTERM or SIGINT to the process, or SIGINT
to all of its processes, as Ctrl-C in a terminal does. A command keeps its promise if it ends within two seconds with
its exit code (75 for the trainer, 130 for all others), prints one line without a traceback, and leaves no process and
no temporary file. A command that finishes before its signal is started again. The last line of output is one JSON
object; the exit code is 1 if a promise was broken.

Example: python tools/chaos_signals.py --workdir /tmp/signals --signals 200
"""

if __name__ == "__main__":  # before the slow imports, so that signals are handled during them
    from jaxlm.host import startup

    startup.tool("chaos_signals")

import dataclasses
import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from jaxlm.config import UserError, cli
from jaxlm.config.paths import user_path
from jaxlm.host import runtime, signals
from jaxlm.host.exit_codes import exit_code
from jaxlm.host.startup import STOPPED, TOOL_STOPPED

ROOT = Path(__file__).parents[1]
FIRST = 0.1  # seconds; before that, Python itself is starting
LIMIT = 2.0  # seconds within which a command must end
HANGS = 120.0  # seconds after which a command is killed
NO_GOOD = ("Traceback", "Exception ignored", "Fatal Python error", "leaked", "Error", "terminate called")
TRAIN = ("train", "train anew")
TOOLS = (
    "generate",
    "evaluate",
    "prepare_data",
    "inspect_data",
    "bench",
    "bench data",
    "bench comm",
    "chaos",
    "netbench",
)
COMMANDS = (*TRAIN, *TOOLS)


@dataclasses.dataclass
class Sent:
    """A signal, and how its command ended."""

    command: str
    kind: str
    after: float  # seconds from the command's start to the signal
    code: int
    seconds: float  # from the signal to the end
    wrong: list[str]


class Bench:
    def __init__(self, folder: Path, within: float, draw: random.Random):
        self.folder, self.draw, self.count = folder, draw, 0
        # Seconds that each command takes, if known.
        self.longest: dict[str, float] = dict.fromkeys(COMMANDS, within)
        self.env = os.environ | {"TMPDIR": str(folder / "tmp"), "JAX_COMPILATION_CACHE_DIR": ""}
        self.process: subprocess.Popen[bytes] | None = None  # the one that gets the next signal
        signals.at_stop(self.kill)
        (folder / "tmp").mkdir()
        keys = {
            "data.source": "text",
            "data.path": ROOT / "jaxlm/**/*.py",
            "data.val_fraction": 0.1,
            "data.tokenizer": "sentencepiece",
            "data.vocab_size": 1000,
            "data.cache_dir": folder / "cache",
            "batch_size": 8,
            "eval.every_steps": 20,
            "eval.baselines": "false",
            "checkpoint.every_steps": 15,
        }
        self.keys = [f"--config.{key}={value}" for key, value in keys.items()]
        train = [*self.line("train anew"), "--config.steps=20", f"--config.data.cache_dir={folder / 'cache'}"]
        subprocess.run(train, env=self.env, check=True, stdout=subprocess.DEVNULL)
        shutil.move(self.folder / "new", self.folder / "done")

    def line(self, command: str) -> list[str]:
        """Returns the command line, after removing what the command makes anew."""
        for name in ("new", "new-cache", "chaos"):
            shutil.rmtree(self.folder / name, ignore_errors=True)
        name, *rest = command.split()
        python, config = [sys.executable], ["--config", str(ROOT / "configs/debug.py")]
        if name == "train":  # runs until it is stopped
            where = ["--workdir", str(self.folder / ("new" if rest else "run")), "--config.steps=1000000"]
            if rest:
                where.append(f"--config.data.cache_dir={self.folder / 'new-cache'}")
            return [*python, "-m", "jaxlm.main", *config, *self.keys, *where]
        more = {
            "generate": ["--workdir", str(self.folder / "done"), "--max_new_tokens=20000"],
            "evaluate": ["--workdir", str(self.folder / "done")],
            "prepare_data": [
                *config,
                "--config.data.source=stdlib",
                "--config.data.tokenizer=sentencepiece",
                "--config.data.vocab_size=8000",
                f"--config.data.cache_dir={self.folder / 'new-cache'}",
            ],
            "chaos": [*config, *self.keys, "--workdir", str(self.folder / "chaos"), "--faults=kill,term"],
            "netbench": ["--config", str(ROOT / "configs/debug.py"), "--tokens=64", "--reduce=pmean", "--rounds=1000"],
        }.get(name, [*config, *self.keys])
        return [*python, str(ROOT / f"tools/{name}.py"), *rest, *more]

    def send(self, command: str) -> Sent | None:
        """Starts the command and sends a signal to it. Returns None if it finished before."""
        kind = self.draw.choice(["SIGTERM", "SIGINT", "Ctrl-C"])
        after = self.draw.uniform(FIRST, self.longest[command])
        line, began, errors = self.line(command), time.monotonic(), self.folder / "stderr"
        with errors.open("w") as stderr:
            process = subprocess.Popen(
                line, cwd=ROOT, env=self.env, stdout=subprocess.DEVNULL, stderr=stderr, start_new_session=True
            )
        self.process = process
        try:
            process.wait(max(0.0, began + after - time.monotonic()))
            self.longest[command] = max(0.5, 0.9 * (time.monotonic() - began))
            if process.returncode:
                raise UserError(f"{command} ended with {process.returncode} by itself: {errors.read_text()[-500:]}")
            return None
        except subprocess.TimeoutExpired:
            pass
        number = signal.SIGTERM if kind == "SIGTERM" else signal.SIGINT
        sent = time.monotonic()
        os.killpg(process.pid, number) if kind == "Ctrl-C" else process.send_signal(number)
        try:
            code = process.wait(HANGS)
        except subprocess.TimeoutExpired:
            code = -signal.SIGKILL
        seconds = time.monotonic() - sent
        wrong = self.look(command, code, seconds, errors.read_text(), process)
        return Sent(command, kind, sent - began, code, seconds, wrong)

    def kill(self) -> None:
        if self.process and self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)

    def look(self, command: str, code: int, seconds: float, said: str, process: Any) -> list[str]:
        """Returns which promises the command broke."""
        want = STOPPED if command.startswith("train") else TOOL_STOPPED
        wrong = [f"exit code {code}"] if code != want else []
        wrong += [f"{seconds:.1f} s"] if seconds > LIMIT else []
        wrong += [f"said {word}" for word in NO_GOOD if word in said]
        if "stopped" not in said and not command.startswith("train"):
            wrong.append("said nothing")
        deadline = time.monotonic() + LIMIT
        while left := _alive(process.pid):
            if time.monotonic() > deadline:
                wrong.append("left a process")
                os.killpg(process.pid, signal.SIGKILL)
                break
            time.sleep(0.02)
        if not left and (files := os.listdir(self.folder / "tmp")):
            wrong.append(f"left {files[0]}")
        for name in os.listdir(self.folder / "tmp"):
            path = self.folder / "tmp" / name
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
        if wrong:
            shutil.copy(self.folder / "stderr", self.folder / f"stderr-{self.count}")
        return wrong


def _alive(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def table(found: list[Sent]) -> dict[str, Any]:
    """Prints a line for each command; returns the numbers."""
    result: dict[str, Any] = {}
    print(f"{'command':14} signals  as promised  seconds: median  largest  exit codes")
    for command in COMMANDS:
        if mine := [s for s in found if s.command == command]:
            seconds = [s.seconds for s in mine]
            codes = {code: sum(s.code == code for s in mine) for code in sorted({s.code for s in mine})}
            kept = sum(not s.wrong for s in mine)
            middle, largest = statistics.median(seconds), max(seconds)
            numbers = {"signals": len(mine), "kept": kept, "median": middle, "largest": largest, "codes": codes}
            result[command] = numbers
            shown = ", ".join(f"{n} x {code}" for code, n in codes.items())
            print(f"{command:14} {len(mine):7}  {kept:11}  {middle:15.2f}  {largest:7.2f}  {shown}")
    return result


def main() -> int:
    parser = cli.Parser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--workdir", required=True, metavar="DIR", help="a new folder for all output")
    parser.add_argument("--signals", type=int, default=200, help="number of signals (default: 200)")
    parser.add_argument("--commands", default=",".join(COMMANDS), metavar="A,B", help="commands to try (default: all)")
    parser.add_argument(
        "--within",
        type=float,
        default=20.0,
        metavar="S",
        help="seconds after a command's start by which its signal comes (default: 20)",
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the random moments (default: 0)")
    args = parser.parse_args()
    names, folder = [name.strip() for name in args.commands.split(",")], user_path("--workdir", args.workdir)
    if wrong := [name for name in names if name not in COMMANDS]:
        raise UserError(f"--commands has {wrong[0]!r}; allowed: {', '.join(COMMANDS)}, separated by commas")
    if args.signals < 1 or not args.within > FIRST:
        raise UserError(
            f"--signals is {args.signals}, --within is {args.within}; allowed: 1 or more signals, more than {FIRST} s"
        )
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"--workdir {folder}: a file, or a folder that is not empty; allowed: a new folder")
    folder.mkdir(parents=True, exist_ok=True)
    bench = Bench(folder.resolve(), args.within, random.Random(args.seed))
    found: list[Sent] = []
    while len(found) < args.signals:
        if sent := bench.send(names[len(found) % len(names)]):
            found.append(sent)
            bench.count += 1
            how = ", ".join(sent.wrong) or f"{sent.seconds:.2f} s"
            print(f"{bench.count} {sent.command} · {sent.kind} after {sent.after:.2f} s · {how}", flush=True)
    print(json.dumps(table(found)))
    return 1 if any(sent.wrong for sent in found) else 0


if __name__ == "__main__":
    runtime.leave(exit_code(main, "chaos_signals"))
