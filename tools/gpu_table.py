"""Puts what gpu_check.sh measured into one table, and that into a document between two marks.

python tools/gpu_table.py FOLDER [DOCUMENT]
"""

import datetime
import importlib.metadata
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from jaxlm.commands.bench_sweep import table_of
from jaxlm.host.durable import write_whole
from jaxlm.run.pages import markdown

# {file of a sweep: configuration}
SWEEPS = {"batches": "gpt2_124m", "remat": "gpt2_124m", "llama": "llama_1b"}
BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"


def main() -> int:
    folder = Path(sys.argv[1])
    measured = [(config, *point) for name, config in SWEEPS.items() for point in read(folder / f"{name}.txt")]
    if not measured:
        print("gpu_table.py: no sweep has measured anything", file=sys.stderr)
        return 1
    grid = [{"configuration": config, "changed": changed} for config, changed, _ in measured]
    table = table_of(grid, [numbers for _, _, numbers in measured])
    devices = next((numbers["devices"] for _, _, numbers in measured if "devices" in numbers), "no device")
    text = f"{devices}; {versions()}; {datetime.date.today()}, commit {commit()}:\n\n{markdown(table)}"
    write_whole(folder / "table.md", text)
    print(f"wrote {folder / 'table.md'}")
    if len(sys.argv) > 2:
        insert(Path(sys.argv[2]), text)
    return 0


def read(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """[(what was changed, numbers)] of a sweep's last line of output; empty if it did not end."""
    try:
        found = json.loads(path.read_text().splitlines()[-1])["points"]
    except (OSError, IndexError, ValueError):
        return []
    return [(" ".join(f"{k}={v}" for k, v in numbers["point"].items()), numbers) for numbers in found]


def versions() -> str:
    def version(name: str) -> str | None:
        try:
            return f"{name} {importlib.metadata.version(name)}"
        except importlib.metadata.PackageNotFoundError:
            return None

    return ", ".join(filter(None, (version(name) for name in ("jax", "flax", "torch"))))


def commit() -> str:
    done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    return done.stdout.strip() or "unknown"


def insert(document: Path, text: str) -> None:
    """Replaces what is between the marks."""
    before, begin, rest = document.read_text().partition(BEGIN)
    _, end, after = rest.partition(END)
    assert begin and end, f"{document} lacks {BEGIN} or {END}"
    write_whole(document, f"{before}{begin}\n{text}{end}{after}")
    print(f"wrote {document}")


if __name__ == "__main__":
    sys.exit(main())
