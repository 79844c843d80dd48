"""`python -m jaxlm.main --config configs/base.py`: flags, checks before any device is touched, exit codes.

Exit codes: 0 done, 1 a bug, 2 the configuration, data or command line is wrong, 3 training diverged, 4 a checkpoint is
unusable, 5 another host is gone or a device is at fault, 75 stopped by a signal after saving, 130 a tool stopped by a
signal.
"""

if __name__ == "__main__":  # before the other imports, so that a signal is heard while they take their time
    from jaxlm.host import startup

    startup.trainer()

import errno
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

from jaxlm.config import UserError, cli, flatten
from jaxlm.config.paths import user_path
from jaxlm.host import distributed, launcher, runtime, signals
from jaxlm.host.startup import STOPPED_TOOL, TOOL_STOPPED


def parser() -> cli.Parser:
    parser = cli.Parser(
        prog="jaxlm", allow_abbrev=False,
        description="Trains a Transformer decoder; goes on by itself when the workdir holds a checkpoint.",
        epilog="Any key can be set: --config.optim.lr=3e-4.", more=_keys,
    )  # fmt: skip
    parser.add_argument(
        "--config", required=True, metavar="FILE", help="a configuration, e.g. configs/base.py, or a run's config.json"
    )
    parser.add_argument("--workdir", metavar="DIR", help="where the run lives (default: runs/<config name>)")
    parser.add_argument(
        "--max_minutes", type=float, metavar="M",
        help="train for so long at most, counted from now: where not all steps fit on this machine, fewer are"
        " made, and the learning rate's schedule is that of the smaller number",
    )  # fmt: skip
    parser.add_argument("--coordinator", metavar="HOST:PORT", help="many hosts, by hand: the first host's address")
    parser.add_argument("--num_processes", type=int, metavar="N", help="many hosts, by hand: how many")
    parser.add_argument("--process_id", type=int, metavar="I", help="many hosts, by hand: which one this is, from 0")
    return parser


def _keys(width: int) -> str:
    from jaxlm.config import keys

    return keys.listing(flatten(cli.load(cli.BASE)) if cli.BASE.is_file() else {}, width)


def run(argv: list[str]) -> int:
    began = time.monotonic()
    args, overrides = parser().parse_known_args(argv)
    file = user_path("--config", args.config)
    if args.workdir is None and file.suffix == ".json":
        raise UserError(f"--workdir is not given; allowed with --config {file}, which is that of a run: a folder")
    workdir = Path("runs") / file.stem if args.workdir is None else user_path("--workdir", args.workdir)
    config = cli.load(file, overrides, workdir)
    if args.max_minutes is not None and not 0 < args.max_minutes < float("inf"):
        raise UserError(f"--max_minutes is {args.max_minutes}; allowed: more than 0")
    processes = launcher.count_processes(args.coordinator, args.num_processes, args.process_id)
    runtime.check_batch(config, config.parallel.devices or 1, processes)
    if processes == 1:
        from jaxlm.run import finished

        if finished.answer(config, workdir, limited=args.max_minutes is not None):
            return 0
    runtime.configure_jax(config, processes)
    hosts = None
    if processes > 1:
        hosts = distributed.join(args.coordinator, args.num_processes, args.process_id)

    def train() -> int:
        shared = {k: v for k, v in flatten(config).items() if k != "data.cache_dir"}
        distributed.check_same("the configuration", shared | {"--max_minutes": args.max_minutes})
        from jaxlm.run import training

        return training.run(config, workdir, args.max_minutes and began + 60 * args.max_minutes, signals.of_program())

    return train() if hosts is None else hosts.run(train, exit_code)


def exit_code(program: Callable[[], int], name: str = "jaxlm", said: list[str] | None = None) -> int:
    """Runs a command line; what a user can mend becomes one line on stderr, added to `said` too, and its exit code."""

    def say(line: str) -> None:
        print(f"{name}: {line}", file=sys.stderr)
        if said is not None:
            said.append(line)

    try:
        try:
            return program()
        finally:
            signals.settle()
    except UserError as error:
        say(" ".join(str(error).split()))
        return 2
    except KeyboardInterrupt:  # where nobody listens to signals
        say(STOPPED_TOOL)
        return TOOL_STOPPED
    except Exception as error:
        codes = {"Diverged": 3, "CheckpointError": 4, "Unsaved": 2, "Corrupt": 5}  # by name: their modules import jax
        code = codes.get(type(error).__name__)
        full = None if type(error).__name__ == "Unsaved" else _exhausted(error)  # that one says it itself
        if code is None and full is None:
            raise
        say(full or " ".join(str(error).split()))
        return code or 2


def _exhausted(error: BaseException | None) -> str | None:
    """What a user can do about a full disk or memory, where that is what an error, or one behind it, says."""
    memory = None
    while error is not None:
        text = " ".join(str(error).split())
        short = text if len(text) <= 300 else f"{text[:150]} … {text[-150:]}"
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or os.strerror(errno.ENOSPC) in text:
            return f"the disk is full: {short}; make room and run the same command again, what was saved whole is there"
        if "RESOURCE_EXHAUSTED" in text or isinstance(error, MemoryError):
            memory = f"out of memory: {short}; a smaller batch_size, more accum_steps or model.remat=full need less"
        error = error.__cause__ or error.__context__
    return memory


if __name__ == "__main__":
    runtime.leave(exit_code(lambda: run(sys.argv[1:])))
