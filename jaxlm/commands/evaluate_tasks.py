"""`jaxlm evaluate --tasks`: scores a run on tasks of EleutherAI's lm-evaluation-harness."""

import argparse
import difflib
import importlib
import importlib.util
import json
import math
import sys
from pathlib import Path
from typing import Any

from jaxlm.config import MAX_INT, UserError, files, show
from jaxlm.config.paths import user_path
from jaxlm.config.pretrained import read_step

LIBRARY = "lm_eval>=0.4.10"
BOOTSTRAP = 1000  # resamplings for a standard error that has no formula
OPTIONS = ("include_path", "num_fewshot", "limit", "batch_size", "max_length", "apply_chat_template")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("tasks", f"of lm-evaluation-harness: pip install '{LIBRARY}'")
    add = group.add_argument
    add("--tasks", metavar="A,B", help="score the run on these tasks or groups of tasks instead")
    add("--include_path", metavar="DIR", help="a folder with more tasks (their YAML files)")
    add("--num_fewshot", metavar="N", help="number of examples before each question (default: the task's)")
    add("--limit", metavar="N", help="score only the first N documents of a task; below 1, a share of them")
    add("--batch_size", metavar="N", help="rows of a batch over all devices (default: auto)")
    add("--max_length", metavar="N", help="most tokens that the model sees (default: seq_len)")
    add("--apply_chat_template", action="store_true", help="write the prompts with the run's chat template")


def check(args: argparse.Namespace, overrides: list[str]) -> None:
    """Raises UserError if options of tasks are given without --tasks, or cannot be what they are."""
    if args.tasks is None:
        if given := [name for name in OPTIONS if getattr(args, name)]:
            raise UserError(f"--{given[0]} is given without --tasks; allowed: only with --tasks")
        return
    if args.answers is not None:
        raise UserError("--answers is given with --tasks; allowed: one of them")
    if overrides:
        raise UserError(f"{overrides[0]} is given with --tasks; allowed with it: {', '.join(OPTIONS)}, workdir, step")
    if not all(name.strip() for name in args.tasks.split(",")):
        raise UserError(f"--tasks is {show(args.tasks)}; allowed: names of tasks, separated by commas")
    for name, least in (("num_fewshot", 0), ("batch_size", 1), ("max_length", 2)):
        text = getattr(args, name)
        automatic = name == "batch_size" and text == "auto"
        if text is not None and not automatic and not (text.isdecimal() and least <= int(text[:11]) <= MAX_INT):
            raise UserError(f"--{name} is {show(text)}; allowed: {least} to {MAX_INT}")
    if args.limit is not None and not 0 < _number(args.limit) < MAX_INT:
        raise UserError(f"--limit is {show(args.limit)}; allowed: a number of documents, or a share below 1")
    if args.include_path is not None and not user_path("--include_path", args.include_path).is_dir():
        raise UserError(f"--include_path is {show(args.include_path)}; allowed: a folder of tasks")
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError(f"--tasks needs lm-evaluation-harness: pip install '{LIBRARY}'")


def run(args: argparse.Namespace, workdir: Path) -> int:
    """Prints a table of the scores and, as the last line, a JSON object. Returns the exit code."""
    read_step("--step", args.step)
    config = files.load_workdir(workdir)  # raises UserError before seconds go into the tasks
    files.check_decoder(str(workdir), config, "--tasks scores continuations, which decoders read as one text")
    lm_eval: Any = importlib.import_module("lm_eval")
    errors = importlib.import_module("datasets.exceptions").DatasetsError, importlib.import_module("yaml").YAMLError
    names = list(dict.fromkeys(name.strip() for name in args.tasks.split(",")))
    try:
        manager = _find(names, args.include_path)
        model = importlib.import_module("jaxlm.interop.harness").JaxLM(
            workdir=str(workdir), step=args.step, batch_size=args.batch_size, max_length=_whole(args.max_length)
        )
        limit = None if args.limit is None else _number(args.limit)
        results = lm_eval.simple_evaluate(
            model=model,
            tasks=names,
            num_fewshot=_whole(args.num_fewshot),
            limit=limit if limit is None or limit < 1 else int(limit),
            apply_chat_template=args.apply_chat_template,
            task_manager=manager,
            log_samples=False,
            bootstrap_iters=BOOTSTRAP,
        )
    except (OSError, *errors) as error:
        reason = show(" ".join(str(error).split())[:300] or type(error).__name__)
        raise UserError(
            f"--tasks {args.tasks}: a task or its data cannot be read ({reason}); allowed: tasks whose data is on this"
            " machine or can be downloaded"
        ) from error
    _print(results, model.run.step)
    return 0


def _find(names: list[str], folder: str | None) -> Any:
    """The harness's manager of the tasks. Raises UserError if it does not know one of the names."""
    make: Any = importlib.import_module("lm_eval.tasks").TaskManager
    if folder is not None:
        manager = make(include_path=folder, include_defaults=False)
        if {*names} <= {*manager.all_subtasks}:
            return manager  # the harness's own 14,000 tasks take seconds to list
    manager = make(include_path=folder)
    for name in names:
        if name not in manager.all_tasks:
            near = difflib.get_close_matches(name, manager.all_tasks, 3)
            hint = f"; did you mean {' or '.join(map(repr, near))}?" if near else ""
            raise UserError(
                f"--tasks: no task is called {show(name)}{hint}; allowed: those of `lm_eval ls tasks` and of"
                " --include_path"
            )
    return manager


def _print(results: dict[str, Any], step: int) -> None:
    make_table = importlib.import_module("lm_eval.utils").make_table
    print(make_table(results))
    if results.get("groups"):
        print(make_table(results, "groups"))
    # Metrics have names such as "acc,none": a metric and how answers were filtered.
    found = {name: {k: v for k, v in scores.items() if "," in k} for name, scores in results["results"].items()}
    more = {key: results[key] for key in ("versions", "n-shot", "n-samples") if key in results}
    sys.stdout.flush()
    print(json.dumps({"step": step, "results": found, **more}, default=str))


def _number(text: str) -> float:
    """The number that a text is; NaN if it is none."""
    try:
        return float(text)
    except ValueError:
        return math.nan


def _whole(text: str | None) -> int | None:
    return None if text is None else int(text)
