"""Finds the commands in the documents, and lets a command's own parser read one without running it."""

import argparse
import importlib
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jaxlm.__main__ import COMMANDS
from jaxlm.config import files, flatten
from tests.runs import ROOT

DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
PROGRAMS = r"(?:\S*/)?jaxlm|(?:\S*/)?python|(?:\S*/)?pytest|sudo|make|git|pip|pre-commit|sbatch|tools/\S+"
COMMAND = re.compile(rf"(?:{PROGRAMS}) \S.*|tools/[\w/]+\.sh|--config\.\w+\.\w+=.*")
# What stands for a value in the documents.
VALUES = {"FILE": "configs/debug.py", "CONFIG": "configs/debug.py", "N": "1", "M": "1", "jaxlm/*.py": "README.md"}
TOOLS = [path.stem for path in (ROOT / "tools").glob("*.py")]


def commands() -> dict[str, bool]:
    """The commands of all documents, without comments; for each whether it is whole, in a block of its own."""
    found: dict[str, bool] = {}
    for path in DOCUMENTS:
        # In turns: text, the language of a block, the block, text, ...
        parts = re.split(r"^```(\w*)\n(.*?)^```$", path.read_text(), flags=re.MULTILINE | re.DOTALL)
        blocks = [block for language, block in zip(parts[1::3], parts[2::3], strict=True) if language in ("", "bash")]
        lines = [(line, True) for block in blocks for line in re.sub(r" *\\\n *", " ", block).splitlines()]
        spans = [" ".join(span.split()) for part in parts[::3] for span in re.findall(r"`([^`]+)`", part)]
        lines += [(span, False) for span in spans if not span.startswith("--")]
        for line, whole in lines:
            line = re.sub(r"\s+#.*", "", line)
            if COMMAND.fullmatch(line):
                found[line] = found.get(line, False) or whole
    return found


def arguments(command: str) -> list[str]:
    """The words of a command, with values for what stands for one."""
    text = re.sub(r"\[|\]|\S*…\S*|(?<= )\.\.\.\S*|--config\.KEY=VALUE|\|best|--help", "", command)
    text = re.sub(r"\$('[^']*')", lambda quoted: quoted[1].replace(r"\n", "\n"), text)
    return [VALUES.get(word.split("=")[-1], word) if word in VALUES else word for word in shlex.split(text)]


class Parsed(BaseException):
    """Leaves a command after its parser."""

    def __init__(self, known: argparse.Namespace, others: list[str]):
        self.known, self.others = known, others


def parse(program: Callable[[], Any], whole: bool) -> Parsed:
    """What the parser of a program found, without running it. `whole`: required arguments must be there."""
    original = argparse.ArgumentParser.parse_known_args

    def parsed(self: argparse.ArgumentParser, *args: Any, **keys: Any) -> Any:
        for action in [] if whole else self._actions:
            action.required = False
        raise Parsed(*original(self, *args, **keys))

    argparse.ArgumentParser.parse_known_args = parsed
    try:
        program()
    except Parsed as found:
        return found
    finally:
        argparse.ArgumentParser.parse_known_args = original
    raise AssertionError("the program parsed nothing")


def check(command: str, whole: bool = True) -> None:
    """Raises unless a command is one that its program takes: its options, its keys, and the files that it names."""
    words = arguments(command)
    while words[0] == "sudo":
        words = words[1:]
    program = Path(words[0]).name
    if program == "make":
        _make(words)
    elif words[0].startswith("tools/") or program in ("sbatch", "pytest"):
        named = [word for word in words if "/" in word and not word.startswith(".venv")]
        assert named and all((ROOT / word).exists() for word in named), command
    elif program in ("jaxlm", "python") or words[0].startswith("--config."):
        _python(words, whole)
    else:
        raise AssertionError(f"{command}: nothing checks this program")


def _make(words: list[str]) -> None:
    """A dry run: all targets are there, and the training that it would start is one that its parser takes."""
    if shutil.which("make"):
        done = subprocess.run(["make", "-n", *words[1:]], cwd=ROOT, capture_output=True, text=True, check=True)
        for line in done.stdout.splitlines():
            if "-m jaxlm.main" in line:
                _python(shlex.split(line), whole=True)


def _python(words: list[str], whole: bool) -> None:
    known, others = (argparse.Namespace(), words) if words[0].startswith("--") else _parsed(words, whole)
    keys = flatten(files.load(files.BASE))
    for word in others:
        option, equals, _ = word.partition("=")
        key = re.sub(r"^--(no)?config\.", "", option)
        assert key != option and key in keys and (equals or option.startswith("--noconfig")), word
    file, text = getattr(known, "config", None), " ".join(others)
    if file and "checkpoint.resume" not in text:  # which needs the run that it names
        path = Path(file) if Path(file).is_file() else files.packaged(Path(file))
        needs = not whole and files.load_file(path).data.source == "text" and "data.path" not in text
        files.load(file, [*others, *["--config.data.path=x"] * needs])


def _parsed(words: list[str], whole: bool) -> tuple[argparse.Namespace, list[str]]:
    program, *argv = words
    if Path(program).name == "python" and argv[:2] != ["-m", "jaxlm.main"]:
        (name,) = [tool for tool in TOOLS if f"tools/{tool}.py" == argv[0]]
        if name in ("chaos", "chaos_signals", "netbench"):
            before, sys.argv = sys.argv, argv
            try:
                found = parse(runpy.run_path(str(ROOT / argv[0]))["main"], whole)
            finally:
                sys.argv = before
            if name == "netbench":
                vars(found.known).pop("config")  # netbench sets the data itself
            return found.known, found.others
        (name,) = re.findall(r'main\("([\w-]+)"\)', (ROOT / argv[0]).read_text())
        argv = argv[1:]
    else:
        name, argv = ("train", argv[2:]) if argv[:1] == ["-m"] else (argv[0], argv[1:])
    module = importlib.import_module(COMMANDS[name].module)
    found = parse(lambda: (module.run if name == "train" else module.main)(argv), whole)
    return found.known, found.others
