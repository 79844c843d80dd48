"""Trains every point of a grid, one after another or as a Slurm array, and compares them.

    jaxlm sweep --config base --grid optim.lr=1e-4,3e-4 --grid seed=0,1

Each point is a run with a workdir of its own in the sweep's folder, trained by a process of its own. A point that fails
or diverges is noted, and the sweep goes on. After Ctrl-C or a kill, the same command, or --workdir alone, continues; a
further --grid adds points. Several such commands at once, one for each GPU say, share the points. At the end come a
table, a page of all curves (report.html in the folder), and as the last line one JSON object.
"""

import argparse
import shlex
from pathlib import Path

from jaxlm.commands import sweep_point, sweep_results, sweep_slurm, sweep_state
from jaxlm.commands.sweep_state import FAILED, Sweep
from jaxlm.config import UserError, cli, files, grid
from jaxlm.config.overrides import with_overrides
from jaxlm.config.paths import user_path
from jaxlm.host import launcher, signals
from jaxlm.host.startup import STOPPED
from jaxlm.run.finished import command

HOSTS = ("--coordinator", "--num_processes", "--process_id")


def main(argv: list[str]) -> int:
    args, overrides = make_parser().parse_known_args(argv)
    _check_hosts(overrides)
    folder = _folder(args)
    if args.slurm:
        sweep_slurm.check_path(args.slurm)
    if args.table:
        _check_alone(args.grid, overrides)
        sweep_results.conclude(sweep_state.read(folder))
        return 0
    sweep = _opened(folder, args, overrides)
    if args.point is not None:
        return sweep_point.train_here(sweep, args.point)
    if args.slurm:
        return _write_slurm(args.slurm, sweep, args.retry)
    return _train_all(sweep, args.retry)


def make_parser() -> argparse.ArgumentParser:
    parser = cli.Parser(
        prog="jaxlm sweep",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        epilog="--config.KEY=VALUE sets a key of all points, as for training.",
    )
    parser.add_argument("--config", metavar="FILE", help="a configuration: a name such as base, or a file")
    parser.add_argument(
        "--grid",
        action="append",
        default=[],
        metavar="KEY=A,B",
        help="values of a key of the configuration; with several --grid all combinations. A value in double quotes may"
        " hold commas",
    )
    parser.add_argument("--workdir", metavar="DIR", help="the sweep's folder (default: runs/<config name>-sweep)")
    parser.add_argument("--retry", action="store_true", help="also trains points again that failed or diverged")
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--point", type=int, metavar="N", help="trains one point only, from 0, as the table numbers them")
    how.add_argument("--slurm", type=Path, metavar="FILE", help="trains nothing; writes a file for sbatch, an array")
    how.add_argument("--table", action="store_true", help="trains nothing; prints the table and writes the page")
    return parser


def _check_hosts(overrides: list[str]) -> None:
    """Raises UserError if several hosts should share a run."""
    for argument in overrides:
        if (option := argument.split("=")[0]) in HOSTS:
            raise UserError(f"{option} is given, but a sweep trains on one host; allowed: --slurm FILE, or jaxlm train")
    if (count := launcher.count_processes(None, None, None)) > 1:
        raise UserError(f"{count} processes were started, but a sweep is one; allowed: --slurm FILE, or jaxlm train")


def _check_alone(arguments: list[str], overrides: list[str]) -> None:
    """Raises UserError if --table comes with options that it would ignore."""
    if arguments or overrides:
        given = "--grid" if arguments else overrides[0].split("=")[0]
        raise UserError(f"{given} is given with --table; allowed: --workdir DIR alone")


def _folder(args: argparse.Namespace) -> Path:
    if args.workdir is not None:
        return user_path("--workdir", args.workdir)
    if args.config is None:
        raise UserError("--config is not given; allowed: --config with --grid, or --workdir with a sweep's folder")
    file = user_path("--config", args.config)
    if file.suffix == ".json":
        raise UserError(f"--workdir is not given; allowed with --config {file}, the config.json of a run: a folder")
    return Path("runs") / f"{file.stem}-sweep"


def _opened(folder: Path, args: argparse.Namespace, overrides: list[str]) -> Sweep:
    """The sweep in the folder, written with the points of the command line if these are new."""
    base = None
    if args.config is not None:
        base = with_overrides(files.load_file(user_path("--config", args.config)), overrides)
    elif overrides:
        with_overrides(files.load_file(files.BASE), overrides)  # an unknown option has a message of its own
        raise UserError(f"{overrides[0].split('=')[0]} is given without --config; allowed: both")
    if args.point is not None:  # before anything is written
        sweep_state.check_index(sweep_state.planned(folder, base, args.grid)[0], args.point)
    return sweep_state.opened(folder, base, args.grid)


def _write_slurm(path: Path, sweep: Sweep, retry: bool) -> int:
    left = [i for i, run in enumerate(sweep.runs) if _is_left(sweep.status(run), retry)]
    if not left:
        raise UserError(f"--slurm is given, but {sweep.folder} has no points left to train; allowed: --table")
    sweep_slurm.write(path, sweep, left)
    print(f"wrote {path} for {len(left)} points; submit it with: sbatch {shlex.quote(str(path))}")
    print(f"then: {command('sweep')} --workdir {shlex.quote(str(sweep.folder))} --table")
    return 0


def _is_left(status: str, retry: bool) -> bool:
    return status in ("waiting", "stopped") or (retry and status in FAILED)


def _train_all(sweep: Sweep, retry: bool) -> int:
    """Trains the points that are left, and concludes. Returns 0 if any point is done, else the exit code of one."""
    stop = signals.of_program()
    stop.defer()
    for i in range(len(sweep.runs)):
        current = sweep_state.read(sweep.folder)  # other processes may have changed it
        code = None
        if _is_left(current.status(current.runs[i]), retry) and not stop.received:
            code = _train(current, i, stop)
        if stop.received or code == STOPPED:
            print(f"stopped in point {i + 1} of {len(sweep.runs)}; run the same command again to continue")
            return STOPPED
    stop.release("stopped after the last point; run the same command again for its table")
    sweep = sweep_state.read(sweep.folder)
    found = sweep_results.conclude(sweep)
    codes = [result.run.exit or 0 for result in found if result.status in FAILED]
    return codes[0] if len(codes) == len(found) else 0


def _train(sweep: Sweep, index: int, stop: signals.StopSignal) -> int:
    """Trains a point in another process, and returns its exit code."""
    name = f"{index + 1}/{len(sweep.runs)} · {grid.name_of(sweep.runs[index].values)}"
    print(f"{name} · {sweep.workdir(sweep.runs[index])}", flush=True)
    code = sweep_point.train_apart(sweep.folder, index, stop)
    now = sweep_state.read(sweep.folder)
    if (status := now.status(now.runs[index])) == "running":
        print(f"{name} · another process trains it", flush=True)
    elif code not in (0, STOPPED):
        print(f"{name} · {status}, exit code {code}", flush=True)
    return code
