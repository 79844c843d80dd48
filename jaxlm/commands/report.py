"""Writes a page about runs: losses, rates, throughput, memory, samples, and what differs between their configurations.

    jaxlm report runs/base runs/wide -o report.html

The page is one file, which needs no network. A run that ends writes its own as WORKDIR/report.html.
"""

from pathlib import Path

from jaxlm.config import UserError, cli, show
from jaxlm.config.paths import user_path
from jaxlm.run.curves import read_history
from jaxlm.run.pages import check_path
from jaxlm.run.report import NAME, write_report


def main(argv: list[str]) -> int:
    parser = cli.Parser(prog="jaxlm report", description=__doc__, allow_abbrev=False)
    parser.add_argument("workdirs", nargs="+", metavar="WORKDIR", help="the folder of a run, e.g. runs/base")
    parser.add_argument("-o", "--output", default=NAME, metavar="FILE", help=f"the page to write (default: {NAME})")
    parser.add_argument(
        "--names", nargs="+", metavar="NAME", help="a name for each run (default: the names of their folders)"
    )
    args = parser.parse_args(argv)
    path = user_path("-o", args.output)
    check_path("-o", path)
    folders = [_workdir(text) for text in args.workdirs]
    runs = [read_history(folder, name) for folder, name in zip(folders, _names(folders, args.names), strict=True)]
    write_report(path, runs)
    print(f"wrote {path}")
    return 0


def _workdir(text: str) -> Path:
    path = user_path("WORKDIR", text)
    if not (path / "config.json").is_file():
        raise UserError(f"WORKDIR is {show(text)}: no config.json there; allowed: the workdir of a run")
    return path


def _names(folders: list[Path], given: list[str] | None) -> list[str]:
    """A name for each run: the given ones, else those of the folders, with as many parents as tell them apart."""
    resolved = [folder.resolve() for folder in folders]
    for place, folder in enumerate(resolved):
        if folder in resolved[:place]:
            raise UserError(f"WORKDIR is {show(str(folders[place]))} twice; allowed: each run once")
    if given is None:
        depths = range(1, max(len(folder.parts) for folder in resolved) + 1)
        names = ([str(Path(*folder.parts[-depth:])) for folder in resolved] for depth in depths)
        return next(found for found in names if len(set(found)) == len(found))
    if len(given) != len(folders) or len(set(given)) < len(given):
        raise UserError(
            f"--names is {show(' '.join(given))}; allowed: {len(folders)} different names, one for each run"
        )
    return given
