"""Checks that rooms import exactly the rooms that they list, and that documents and comments name existing files."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "jaxlm"
# From bottom to top.
ROOMS = ["config", "host", "model", "sync", "data", "train", "plan", "checkpoint", "run", "interop", "commands"]


def imports(path: Path) -> Iterator[str]:
    """Yields the modules of jaxlm that a file imports, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names if node.module.startswith("jaxlm"))
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.startswith("jaxlm"))


def imported_rooms(room: str) -> set[str]:
    found = {name.split(".")[1] for path in (PACKAGE / room).rglob("*.py") for name in imports(path)}
    return found - {room, "configs", "__version__"}  # packaged files and a string, not rooms


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_what_it_says(room: str):
    listed = re.search(
        r"^May import: (.*)\.$", ast.get_docstring(ast.parse((PACKAGE / room / "__init__.py").read_text())) or "", re.M
    )
    assert listed, f"jaxlm/{room}/__init__.py does not say what it may import"
    allowed = [] if listed[1] == "nothing" else listed[1].split(", ")
    assert imported_rooms(room) == set(allowed)  # no more and no less
    assert set(allowed) <= set(ROOMS[: ROOMS.index(room)])


def test_every_module_is_in_a_room():
    outside = {path.name for path in PACKAGE.glob("*.py")}
    assert outside == {"__init__.py", "__main__.py", "main.py"}
    assert {path.name for path in PACKAGE.iterdir() if path.is_dir() and path.name != "__pycache__"} == {
        *ROOMS,
        "configs",
    }


DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_documents_name_files_that_exist(document: Path):
    named = re.findall(r"\b(?:jaxlm|configs|docs|tests|tools)/[\w/]+\.(?:py|md|sh|yaml|sbatch)\b", document.read_text())
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_the_reading_order_lists_the_right_line_counts():
    rows = re.findall(r"^\| `([\w/]+\.py)` \| (\d+) \|", (ROOT / "docs/architecture.md").read_text(), re.MULTILINE)
    lines = {name: len((ROOT / name).read_text().splitlines()) for name, _ in rows}
    assert len(rows) > 10
    for name, listed in rows:
        assert lines[name] == pytest.approx(int(listed), rel=0.1, abs=10), name
    modules = [*PACKAGE.rglob("*.py")]
    package = sum(len(path.read_text().splitlines()) for path in modules)
    for document, actual in (
        (r"architecture\.md.* trainer: (\d+) files, about ([\d,]+) lines", (len(rows), sum(lines.values()))),
        (r"README\.md.*\[(\d+) files, ([\d,]+) lines", (len(rows), sum(lines.values()))),
        (r"architecture\.md.*is about ([\d,]+) lines in (\d+) files", (package, len(modules))),
    ):
        text = "\n".join(f"{path.name} {path.read_text()}" for path in DOCUMENTS)
        found = re.search(document, text, re.DOTALL)
        assert found and [int(n.replace(",", "")) for n in found.groups()] == pytest.approx(actual, rel=0.05), document


def test_comments_name_files_that_exist():
    files = [*PACKAGE.rglob("*.py"), *(ROOT / "tools").glob("*.py"), *(ROOT / "configs").glob("*.py")]
    known = {path.name for path in [*files, *(ROOT / "tests").rglob("*.py")]}
    theirs = {"model.py", "prepare.py", "script.py", "train.py"}  # files of nanoGPT and of users
    for path in files:
        assert set(re.findall(r"\b\w+\.py\b", path.read_text())) <= known | theirs, path
