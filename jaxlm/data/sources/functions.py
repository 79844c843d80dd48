"""The source `functions`: the documented functions of Python's standard library, a corpus that every machine has.

A record is a function or method with a docstring, and has the keys name, docstring, code (the whole definition) and
file. With data.prompt_key=docstring and data.response_key=name, a model learns to name functions.
"""

import ast
import textwrap
import warnings
from collections.abc import Callable, Iterator

from jaxlm.config import DataConfig
from jaxlm.data.sources.documents import Source
from jaxlm.data.sources.records import Format, RecordPart, open_records
from jaxlm.data.sources.splits import Files
from jaxlm.data.sources.stdlib import python_files


def open_functions(data: DataConfig) -> Source:
    """The functions of the .py files of the standard library, without its tests.

    Equal docstrings are all in one split, so none of the validation set's is trained on.

    Raises:
      UserError: this Python has no .py files of its standard library, or a record has no such key.
    """
    files, skipped = python_files()
    form = Format("function", lambda part, _: [part], _functions, split_by="docstring")
    return open_records(data, form, Files(files, {}, ()), skipped)


def _functions(part: RecordPart, data: DataConfig) -> Iterator[tuple[int, Callable[[], int], dict[str, str]]]:
    """Yields (place, number, record) of each documented function; places are numbers of lines."""
    text = part.path.read_text("utf-8")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of escape sequences in old code
        try:
            nodes = ast.walk(ast.parse(text))
        except SyntaxError:  # a template of code
            return
    functions = [node for node in nodes if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    lines = text.split("\n")  # not at form feeds, as ast counts lines
    for i, node in enumerate(sorted(functions, key=lambda node: node.lineno)):
        if docstring := ast.get_docstring(node):
            code = textwrap.dedent("\n".join(lines[node.lineno - 1 : node.end_lineno])) + "\n"
            record = {"name": node.name, "docstring": docstring, "code": code, "file": part.name}
            yield node.lineno, (lambda number=i + 1: number), record
