"""`python -m jaxlm.main --config configs/base.py`: flags, checks before any device is touched, exit codes.

Exit codes: 0 done, 1 a bug, 2 the configuration, data or command line is wrong, 3 training diverged, 4 a checkpoint is
unusable, 75 stopped by a signal after saving.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

from jaxlm import cli, runtime
from jaxlm.config import UserError


def _parse(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    parser = cli.Parser(
        prog="jaxlm", allow_abbrev=False,
        description="Trains a Transformer decoder; goes on by itself when the workdir holds a checkpoint.",
        epilog="Any key can be set: --config.optim.lr=3e-4. The keys are in configs/base.py.",
    )  # fmt: skip
    parser.add_argument("--config", required=True, metavar="FILE", help="a configuration, e.g. configs/base.py")
    parser.add_argument("--workdir", metavar="DIR", help="where the run lives (default: runs/<config name>)")
    parser.add_argument("--coordinator", metavar="HOST:PORT", help="many hosts, by hand: the first host's address")
    parser.add_argument("--num_processes", type=int, metavar="N", help="many hosts, by hand: how many")
    parser.add_argument("--process_id", type=int, metavar="I", help="many hosts, by hand: which one this is, from 0")
    return parser.parse_known_args(argv)


def run(argv: list[str]) -> int:
    args, overrides = _parse(argv)
    file = cli.user_path("--config", args.config)
    workdir = Path("runs") / file.stem if args.workdir is None else cli.user_path("--workdir", args.workdir)
    config = cli.load(file, overrides)
    processes = runtime.count_processes(args.coordinator, args.num_processes, args.process_id)
    runtime.check_batch(config, config.parallel.devices or 1, processes)
    runtime.configure_jax(config, processes)
    if processes > 1:
        runtime.join(args.coordinator, args.num_processes, args.process_id)

    from jaxlm import run as runs

    return runs.run(config, workdir)


def exit_code(program: Callable[[], int], name: str = "jaxlm") -> int:
    """Runs a command line; what a user can mend becomes one line on stderr and its exit code."""
    try:
        return program()
    except UserError as error:
        print(f"{name}: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        code = {"Diverged": 3, "CheckpointError": 4}.get(type(error).__name__)  # by name: their modules import jax
        if code is None:
            raise
        print(f"{name}: {' '.join(str(error).split())}", file=sys.stderr)
        return code


if __name__ == "__main__":
    runtime.relaunch_with_huge_pages()
    sys.exit(exit_code(lambda: run(sys.argv[1:])))
