"""The program `jaxlm COMMAND`, or `python -m jaxlm COMMAND`: starts the command that the command line names."""

import sys
from typing import NamedTuple, NoReturn

from jaxlm.host import startup


class Command(NamedTuple):
    module: str  # `main` in it, or `run` for training, takes the arguments
    does: str  # one line of `jaxlm --help`


COMMANDS = {
    "train": Command("jaxlm.main", "train a configuration, or resume a run"),
    "sweep": Command("jaxlm.commands.sweep", "train every point of a grid of values, and compare them"),
    "generate": Command("jaxlm.commands.generate", "sample text from a run"),
    "evaluate": Command("jaxlm.commands.evaluate", "score a run on its validation data, or on other data"),
    "prepare": Command("jaxlm.commands.prepare", "tokenize the data of a configuration, without training"),
    "inspect": Command("jaxlm.commands.inspect", "print the data as the model sees it"),
    "plan": Command("jaxlm.commands.plan", "say what a run would need, without running it"),
    "import-hf": Command("jaxlm.commands.import_hf", "make a workdir of a Hugging Face model"),
    "export-hf": Command("jaxlm.commands.export_hf", "write a run's model for transformers"),
    "report": Command("jaxlm.commands.report", "draw runs on a page: curves, samples, what differs"),
    "show": Command("jaxlm.commands.show", "list a model's parts, and the checkpoints of a run"),
    "bench": Command(
        "jaxlm.commands.bench", "time the step; `bench data`: the data; `bench comm`: what the devices exchange"
    ),
}
FAST = ("train", "evaluate", "bench")  # gain from huge pages, for which the program starts itself again


def main(*before: str) -> NoReturn:
    """Runs a command and ends the process with its exit code. Its arguments are `before` and the command line's."""
    arguments = [*before, *sys.argv[1:]]
    name, argv = (arguments[0], arguments[1:]) if arguments else ("", [])
    if name in ("train", "sweep"):
        startup.trainer()
    else:
        startup.tool(huge_pages=name in FAST)

    import importlib

    from jaxlm.host import runtime
    from jaxlm.host.exit_codes import exit_code

    def program() -> int:
        if name not in COMMANDS:
            return _without_command(name)
        module = importlib.import_module(COMMANDS[name].module)
        return module.run(argv) if name == "train" else module.main(argv)

    runtime.leave(exit_code(program))


def _without_command(name: str) -> int:
    """Prints the help or the version and returns 0. Raises UserError if `name` is none of these."""
    from difflib import get_close_matches

    import jaxlm
    from jaxlm.config import UserError, show

    if name in ("-h", "--help"):
        print("usage: jaxlm COMMAND ...\n\ncommands; each has --help:\n")
        print("\n".join(f"  {name:10}{command.does}" for name, command in COMMANDS.items()))
        return 0
    if name == "--version":
        print(f"jaxlm {jaxlm.__version__}")
        return 0
    nearest = get_close_matches(name, COMMANDS, 1)
    hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
    raise UserError(f"command is {show(name)}{hint}; allowed: {', '.join(COMMANDS)}, --help, --version")


if __name__ == "__main__":
    main()
