"""Chat templates in Jinja, as pretrained models ship them, written out as `transformers` does.

A template is a program by somebody else, so it runs in jinja2's sandbox. Special tokens in what a template writes
become their ids, but in messages they are text: `guarded` puts a mark into their names, which the template copies.
"""

import functools
import json
import re
from datetime import datetime
from typing import Any, ClassVar, NamedTuple

import jinja2
import jinja2.ext
from jinja2 import nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment

from jaxlm.config import UserError, show

# Characters that Unicode reserves for use inside programs; messages that hold them are refused.
GUARD, OPEN, CLOSE = MARKS = "\ufdd0\ufdd1\ufdd2"
# What a template takes for today in training data, so that a corpus has the same tokens on every day. It is the date
# that Llama's templates write where they know none.
TRAINING_DATE = datetime(2024, 7, 26)
# Roles that templates know. Any other role is data, so it must not complete the name of a special token.
ROLES = ("system", "developer", "user", "assistant", "tool", "function", "ipython", "model")


class ChatTemplate(NamedTuple):
    source: str  # Jinja
    tokens: dict[str, str]  # variables of the template: the names bos_token, eos_token and others
    bos: str  # name of the token that opens every document, which the template need not write; "" = it has no name
    specials: tuple[str, ...]  # names that become ids in what the template writes; longest first


class TemplateError(UserError):
    """The template refuses a conversation. The error's text continues a line that begins with a name."""


class _Generation(jinja2.ext.Extension):
    """{% generation %} ... {% endgeneration %}: encloses what the assistant writes."""

    tags: ClassVar[set[str]] = {"generation"}

    def parse(self, parser: Any) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_enclosed"), [], [], body).set_lineno(line)

    def _enclosed(self, caller: Any) -> str:
        return f"{OPEN}{caller()}{CLOSE}"


@functools.lru_cache(maxsize=16)
def compiled(source: str) -> jinja2.Template:
    """The program of a template. Raises UserError if it is not Jinja."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise
    try:
        return environment.from_string(source)
    except jinja2.TemplateSyntaxError as error:
        raise UserError(
            f"data.chat_template is not Jinja in line {error.lineno} ({error.message}); allowed: a template that "
            f"jinja2 {jinja2.__version__} reads, or a text with {{role}} and {{content}}"
        ) from None


def marks_answers(template: ChatTemplate) -> bool:
    """Whether the template itself says what the assistant writes, by {% generation %} blocks."""
    return bool(re.search(r"{%[-+]?\s*generation\b", template.source))


def render(template: ChatTemplate, messages: list[dict[str, Any]], opening: bool, today: datetime) -> str:
    """The text of messages, without a bos at its start.

    Args:
      opening: whether to open the assistant's next message (add_generation_prompt).
      today: what the template takes for today (strftime_now).

    Raises:
      TemplateError: the template cannot write these messages.
    """
    program = compiled(template.source)
    given = {"messages": messages, "add_generation_prompt": opening, "strftime_now": today.strftime}
    try:
        text = program.render(**template.tokens, tools=None, documents=None, **given)
    except Exception as error:  # a program by somebody else may raise anything
        reason = show(" ".join(str(error).replace(GUARD, "").split()) or type(error).__name__)
        raise TemplateError(
            f": data.chat_template refuses these messages ({reason}); allowed: roles and orders that it knows"
        ) from None
    return text.removeprefix(template.bos)


def guarded(value: Any, template: ChatTemplate) -> Any:
    """A copy of a message in which GUARD is within each name of a special token."""
    if isinstance(value, str):
        return _guarded_text(value, template)
    if isinstance(value, list):
        return [guarded(each, template) for each in value]
    if isinstance(value, dict):
        copy = {guarded(key, template): guarded(each, template) for key, each in value.items() if each is not None}
        if isinstance(role := copy.get("role"), str) and role not in ROLES and GUARD not in role:
            copy["role"] = role[:1] + GUARD + role[1:]
        return copy
    return value


def _guarded_text(text: str, template: ChatTemplate) -> str:
    if any(mark in text for mark in MARKS):
        raise TemplateError(": a message holds a character of U+FDD0 to U+FDD2; allowed: text, which has none of them")
    names = _names_anywhere(template.specials)
    return names.sub(lambda match: match[0] + GUARD, text) if names else text


@functools.lru_cache(maxsize=4)
def _names_anywhere(specials: tuple[str, ...]) -> re.Pattern[str] | None:
    """Matches the first character of each name, also of names that overlap."""
    return re.compile(f"(?={'|'.join(map(re.escape, specials))})(?s:.)") if specials else None


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """JSON without escapes for HTML, which jinja2's own filter makes."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)
