"""Training's command line: `jaxlm train --config FILE`, or `python -m jaxlm.main --config FILE`.

Parses the flags, loads and checks the configuration before any device is touched, joins other hosts, and trains.
"""

if __name__ == "__main__":  # before the other imports, which take seconds, so that signals are handled meanwhile
    from jaxlm.host import startup

    startup.trainer()

import sys
import time
from pathlib import Path

from jaxlm.config import UserError, cli, files, flatten
from jaxlm.config.paths import user_path
from jaxlm.host import distributed, launcher, runtime, signals
from jaxlm.host.exit_codes import exit_code
from jaxlm.host.join import join


def parser() -> cli.Parser:
    parser = cli.Parser(
        prog="jaxlm train",
        allow_abbrev=False,
        description="Train a Transformer decoder. If the workdir holds a checkpoint, the run resumes from it.",
        epilog="Any key can be set: --config.optim.lr=3e-4.",
        more=_keys,
    )
    parser.add_argument(
        "--config",
        required=True,
        metavar="FILE",
        help="a configuration file or name, e.g. base, or a run's config.json",
    )
    parser.add_argument("--workdir", metavar="DIR", help="the run's folder (default: runs/<config name>)")
    parser.add_argument(
        "--max_minutes",
        type=float,
        metavar="M",
        help="train for about M minutes, counted from now: a few steps are timed first, and if not all steps fit, the"
        " run gets fewer, with a learning-rate schedule for that number",
    )
    parser.add_argument(
        "--coordinator", metavar="HOST:PORT", help="several hosts without a launcher: address of the first"
    )
    parser.add_argument("--num_processes", type=int, metavar="N", help="several hosts without a launcher: how many")
    parser.add_argument(
        "--process_id", type=int, metavar="I", help="several hosts without a launcher: which one this is, from 0"
    )
    return parser


def _keys(width: int) -> str:
    """The list of all keys, with the defaults of configs/base.py, for `--help`."""
    from jaxlm.config import files, keys

    return keys.listing(flatten(files.load(files.BASE)), width)


def run(argv: list[str]) -> int:
    """Trains as the arguments say, and returns the exit code.

    Raises:
      UserError: an argument or a key is wrong.
    """
    began = time.monotonic()
    args, overrides = parser().parse_known_args(argv)
    file = user_path("--config", args.config)
    if args.workdir is None and file.suffix == ".json":
        raise UserError(f"--workdir is not given; allowed with --config {file}, the config.json of a run: a folder")
    workdir = Path("runs") / file.stem if args.workdir is None else user_path("--workdir", args.workdir)
    config = files.load(file, overrides, workdir)
    if args.max_minutes is not None and not 0 < args.max_minutes < float("inf"):
        raise UserError(f"--max_minutes is {args.max_minutes}; allowed: more than 0")
    processes = launcher.count_processes(args.coordinator, args.num_processes, args.process_id)
    runtime.check_batch(config, config.parallel.devices, processes)
    if processes == 1:
        from jaxlm.run import finished

        if finished.answer(config, workdir, limited=args.max_minutes is not None):
            return 0
    runtime.configure_jax(config, processes)
    hosts = None
    if processes > 1:
        hosts = join(args.coordinator, args.num_processes, args.process_id)

    def train() -> int:
        shared = {k: v for k, v in flatten(config).items() if k != "data.cache_dir"}
        distributed.check_same("the configuration", shared | {"--max_minutes": args.max_minutes})
        from jaxlm.run import training

        return training.run(config, workdir, args.max_minutes and began + 60 * args.max_minutes, signals.of_program())

    return train() if hosts is None else hosts.run(train, exit_code)


if __name__ == "__main__":
    runtime.leave(exit_code(lambda: run(sys.argv[1:])))
