"""What a Jinja chat template writes for a conversation, and which parts of it the assistant wrote.

A template says so itself with {% generation %} blocks. Otherwise an answer begins where the template, given the
messages before it, has opened the assistant's message. It ends after what the template writes behind it, such as
<|im_end|>: what follows the answer both when it is the last message and in the whole conversation.
"""

import functools
import itertools
import re
from datetime import datetime
from typing import Any

from jaxlm.config import UserError
from jaxlm.data.sources.jinja_templates import (
    CLOSE,
    OPEN,
    TRAINING_DATE,
    ChatTemplate,
    TemplateError,
    guarded,
    marks_answers,
    render,
)

Turns = list[dict[str, Any]]
END = "CONTINUE_FINAL_MESSAGE_TAG "  # behind a message that a model is to continue, as in `transformers`


def segments(turns: Turns, template: ChatTemplate) -> list[tuple[str, bool]]:
    """The text of a conversation in segments (text, whether the assistant wrote it). Within a text, a GUARD is in each
    special token's name that is only text.

    Raises:
      UserError: the template refuses the messages or does not show where the answers are. The error's text continues a
        line that begins with the record's name.
    """
    turns = [guarded(turn, template) for turn in turns]
    write = functools.partial(render, template, today=TRAINING_DATE)
    if marks_answers(template):
        parts = re.split(f"[{OPEN}{CLOSE}]", write(turns, opening=False))
        if len(parts) == 1:
            raise UserError(": data.chat_template writes no {% generation %} block; allowed: one for each answer")
        return [(part, i % 2 == 1) for i, part in enumerate(parts)]
    answers = [i for i, turn in enumerate(turns) if turn["role"] == "assistant"]
    marked = [turn | {"content": _closed(turn["content"])} if i in answers else turn for i, turn in enumerate(turns)]
    parts = write(marked, opening=False).split(CLOSE)
    text = "".join(parts)
    if len(parts) != len(answers) + 1 or text != write(turns, opening=False):
        raise UserError(
            f": data.chat_template shows {len(parts) - 1} of {len(answers)} answers, or changes them; allowed: a "
            "template that writes each once, or {% generation %} blocks around what to train on"
        )
    found, done = [], 0
    for i, end in zip(answers, itertools.accumulate(map(len, parts)), strict=False):
        before = write(turns[:i], opening=True)
        if not (text.startswith(before) and done <= len(before) <= end):
            raise UserError(
                f": data.chat_template writes the messages before message {i} otherwise when no answer follows; "
                "allowed: one whose add_generation_prompt opens each answer, or {% generation %} blocks around them"
            )
        behind = write(marked[: i + 1], opening=False).rpartition(CLOSE)[2]
        stop = _before_name(text, end + _shared(behind, text[end : end + len(behind)]), template)
        found += [(text[done : len(before)], False), (text[len(before) : stop], True)]
        done = stop
    return found


def _closed(content: str) -> str:
    """An answer with CLOSE behind its last character that is no space, because templates strip the spaces behind it."""
    bare = content.rstrip()
    return bare + CLOSE + content[len(bare) :]


def _before_name(text: str, stop: int, template: ChatTemplate) -> int:
    """The last place up to `stop` that is not within the name of a special token."""
    for name in template.specials:
        at = text.find(name, max(0, stop - len(name) + 1), stop + len(name) - 1)
        if 0 <= at < stop:
            return at
    return stop


def question(prompt: str, template: ChatTemplate) -> str:
    """The text of a user's message and of the opening of the answer; GUARD as in `segments`. Raises UserError."""
    try:
        return render(template, [guarded({"role": "user", "content": prompt}, template)], True, datetime.now())
    except TemplateError as error:
        raise UserError(str(error).removeprefix(": ")) from None


def plain_text(turns: Turns, template: ChatTemplate, opening: bool) -> str:
    """What the template writes, a bos included, without a difference between markup and names that are only text.

    Args:
      opening: whether the assistant's next message is opened; otherwise the text ends with the last message's content,
        which a model is to continue.

    Raises:
      TemplateError: the template refuses the messages, or leaves out the last one.
    """
    marked = turns if opening else [*turns[:-1], turns[-1] | {"content": turns[-1]["content"] + END}]
    text = render(template._replace(bos=""), marked, opening, datetime.now())
    text = re.sub(f"[{OPEN}{CLOSE}]", "", text)
    if opening:
        return text
    before, end, after = text.rpartition(END.strip())
    if not end:
        raise TemplateError(": data.chat_template leaves out the last message; allowed: a template that writes it")
    return before if after.startswith(" ") else before.rstrip()  # a template may strip a message


def after_answer(template: ChatTemplate) -> tuple[str, str]:
    """The text after an answer, and the text that opens the user's next message; "" if the template refuses it."""
    turns = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": f"a{CLOSE}"},
        {"role": "user", "content": f"{OPEN}a"},
    ]
    try:
        last, both = (_behind(render(template, turns[:n], False, TRAINING_DATE)) for n in (2, 3))
    except TemplateError:
        return "", ""
    both = both.partition(OPEN)[0]
    after = both[: _before_name(both, _shared(last, both), template)] if both else last
    return after, both[len(after) :]


def _shared(a: str, b: str) -> int:
    """The length of the beginning that two texts share."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _behind(text: str) -> str:
    """What follows the answer, which ends with CLOSE."""
    return text.partition(CLOSE)[2].replace(CLOSE, "")  # {% generation %} has its own
