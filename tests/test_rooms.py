"""Rooms import only rooms below them, and say which; documents name files that exist."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "jaxlm"
ROOMS = ["config", "host", "model", "sync", "data", "train", "checkpoint", "run", "commands"]  # from the ground up


def imports(path: Path) -> Iterator[str]:
    """The modules of jaxlm that a file imports, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names if node.module.startswith("jaxlm"))
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.startswith("jaxlm"))


def imported_rooms(room: str) -> set[str]:
    found = {name.split(".")[1] for path in (PACKAGE / room).rglob("*.py") for name in imports(path)}
    return found - {room, "configs", "__version__"}  # packaged files, and a text: no rooms


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_what_it_says(room: str):
    said = re.search(
        r"^May import: (.*)\.$", ast.get_docstring(ast.parse((PACKAGE / room / "__init__.py").read_text())) or "", re.M
    )
    assert said, f"jaxlm/{room}/__init__.py does not say what it may import"
    allowed = [] if said[1] == "nothing" else said[1].split(", ")
    assert imported_rooms(room) == set(allowed)  # no more, and nothing that is said in vain
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


def test_the_way_to_read_it_has_the_length_that_is_said():
    rows = re.findall(r"^\| `([\w/]+\.py)` \| (\d+) \|", (ROOT / "docs/architecture.md").read_text(), re.MULTILINE)
    lines = {name: len((ROOT / name).read_text().splitlines()) for name, _ in rows}
    assert len(rows) > 10
    for name, said in rows:
        assert lines[name] == pytest.approx(int(said), rel=0.1, abs=10), name
    modules = [*PACKAGE.rglob("*.py")]
    package = sum(len(path.read_text().splitlines()) for path in modules)
    for document, actual in (
        (r"architecture\.md.* trainer: (\d+) files, about ([\d,]+) lines", (len(rows), sum(lines.values()))),
        (r"README\.md.*\[(\d+) files, ([\d,]+) lines", (len(rows), sum(lines.values()))),
        (r"architecture\.md.*is about ([\d,]+) lines in (\d+) files", (package, len(modules))),
    ):
        text = "\n".join(f"{path.name} {path.read_text()}" for path in DOCUMENTS)
        said = re.search(document, text, re.DOTALL)
        assert said and [int(n.replace(",", "")) for n in said.groups()] == pytest.approx(actual, rel=0.05), document


def test_comments_name_files_that_exist():
    files = [*PACKAGE.rglob("*.py"), *(ROOT / "tools").glob("*.py"), *(ROOT / "configs").glob("*.py")]
    known = {path.name for path in [*files, *(ROOT / "tests").rglob("*.py")]}
    theirs = {"model.py", "prepare.py", "script.py", "train.py"}  # nanoGPT's, and a user's
    for path in files:
        assert set(re.findall(r"\b\w+\.py\b", path.read_text())) <= known | theirs, path
