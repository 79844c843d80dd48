"""Writes conversations as text with a chat template. A run trains only on the assistant's messages."""

import itertools
from typing import Any

from jaxlm.config import DataConfig, UserError
from jaxlm.config.schema import OF_TOKENIZER
from jaxlm.data.sources import jinja_chats
from jaxlm.data.sources.documents import Spans, TextPiece
from jaxlm.data.sources.jinja_templates import GUARD, ChatTemplate, compiled
from jaxlm.data.tokenizers import Tokenizer, make_tokenizer, shipped
from jaxlm.data.tokenizers.hf import ENDS

LEARNED = "assistant"  # the role whose messages are trained on
ASKS = "user"
TEMPLATE_ROLES = ("system", ASKS, LEARNED)  # markup, as the template itself is; any other role is data

# Who speaks in ShareGPT's records. Other names stay as they are.
SHAREGPT = {"human": ASKS, "user": ASKS, "gpt": LEARNED, "assistant": LEARNED, "system": "system"}

Template = str | ChatTemplate  # a text with {role} and {content}, or Jinja


def conversation(messages: Any, key: str, template: Template) -> list[TextPiece]:
    """Returns the pieces of a conversation, without what follows the assistant's last message.

    Args:
      messages: [{"role": ..., "content": ...}, ...], or ShareGPT's [{"from": ..., "value": ...}, ...].
      key: the name of `messages` in errors.
      template: in Jinja, or a text that writes one message and holds {role} and {content}. The text after {content}
        belongs to the content, so that a model learns where to stop.

    Raises:
      UserError: `messages` is not a list of messages with texts, or none is the assistant's, or the template cannot
        write them. The error's text continues a line that begins with the record's name.
    """
    if not isinstance(messages, list):
        raise UserError(f": '{key}' is {type(messages).__name__}; allowed: a list of messages with role and content")
    turns = [_turn(message, i, key) for i, message in enumerate(messages)]
    while turns and turns[-1]["role"] != LEARNED:
        turns.pop()
    if not turns:
        raise UserError(f": '{key}' has no message of role '{LEARNED}', so there is nothing to train on")
    if isinstance(template, ChatTemplate):
        pieces = [_from_marked(text, learned) for text, learned in jinja_chats.segments(turns, template)]
        while pieces and not pieces[-1].learned:
            pieces.pop()
    else:
        pieces = [piece for turn in turns for piece in _message(turn["role"], turn["content"], template)]
    pieces = [piece for piece in pieces if piece.text]
    if not pieces:
        raise UserError(f": '{key}' is empty; allowed: texts")
    return pieces


def _turn(message: Any, i: int, key: str) -> dict[str, Any]:
    """Message i as {"role": ..., "content": ..., and what else it has}. Raises UserError if it has no text."""
    found = dict(message) if isinstance(message, dict) else {}
    for name, other in (("role", "from"), ("content", "value")):
        if found.get(name) is None and isinstance(found.get(other), str):
            found[name] = found.pop(other)
        if not isinstance(found.get(name), str):
            raise UserError(
                f": '{key}' message {i} has no text '{name}'; allowed: messages with role and content, or with "
                "from and value"
            )
        if "\0" in found[name]:
            raise UserError(f": '{key}' message {i} holds a NUL character; allowed: text")
    if message.get("role") is None:
        found["role"] = SHAREGPT.get(found["role"], found["role"])
    return found


def _from_marked(text: str, learned: bool) -> TextPiece:
    """A piece of what a Jinja template wrote. All of it is markup, but no special token reaches over a GUARD."""
    ends = list(itertools.accumulate(map(len, parts := text.split(GUARD))))
    return TextPiece("".join(parts), learned, tuple(zip([0, *ends], ends, strict=False)), shipped=True)


def trains_on_answers(data: DataConfig) -> bool:
    """Whether a run trains on answers to prompts instead of whole texts."""
    return bool(data.messages_key or data.response_key)


def question(prompt: str, data: DataConfig, tokenizer: Tokenizer) -> list[TextPiece]:
    """The pieces of a user's message and of the opening of the answer."""
    if not _has_template(data):
        return [TextPiece(prompt, False)]
    template = template_of(data, tokenizer)
    if isinstance(template, ChatTemplate):
        return [_from_marked(jinja_chats.question(prompt, template), False)]
    opening = _message(LEARNED, "", template)[0]
    return [piece for piece in (*_message(ASKS, prompt, template), opening) if piece.text]


def chat_text(turns: list[dict[str, Any]], template: Template, opening: bool) -> str:
    """The text of a conversation of messages with role and content, names of special tokens included.

    Args:
      opening: whether the answer is opened; otherwise the text ends with the last message's content.

    Raises:
      UserError: the template cannot write them.
    """
    if isinstance(template, ChatTemplate):
        return jinja_chats.plain_text(turns, template, opening)
    pieces = [_message(turn["role"], turn["content"], template) for turn in turns]
    text = "".join(before.text + content.text for before, content in pieces)
    if opening:
        return text + _message(LEARNED, "", template)[0].text
    return text.removesuffix(_message(turns[-1]["role"], "", template)[1].text)


def after_answer(data: DataConfig, tokenizer: Tokenizer) -> tuple[str, str]:
    """The text that the template writes after an answer, and the text that opens the user's next message."""
    if not _has_template(data):
        return "", ""
    template = template_of(data, tokenizer)
    if isinstance(template, ChatTemplate):
        return jinja_chats.after_answer(template)
    return _message(LEARNED, "", template)[1].text, _message(ASKS, "", template)[0].text


def template_of(data: DataConfig, tokenizer: Tokenizer | None) -> Template:
    """The chat template of a configuration.

    Args:
      tokenizer: knows the names of special tokens, and the template itself if `data.chat_template` is tokenizer. None
        loads the one at `data.tokenizer_path`; without a path, the corpus decides on a tokenizer that has no names.

    Raises:
      UserError: the tokenizer cannot be loaded or came without a template, or the template is not Jinja.
    """
    if not data.jinja:
        return data.chat_template
    if tokenizer is None and data.tokenizer_path:
        tokenizer = make_tokenizer(data, list, list)
    source = data.chat_template
    files = tokenizer.beside if tokenizer else {}
    if source == OF_TOKENIZER and not (source := shipped.chat_template(files)):
        raise UserError(
            f"data.chat_template is '{OF_TOKENIZER}', but {data.tokenizer_path or 'this tokenizer'} came without "
            f"a chat template; allowed: a template, or a tokenizer with {shipped.TEMPLATE} or a chat_template in "
            f"{shipped.CONFIG} beside it"
        )
    compiled(source)
    names, specials = shipped.token_names(files), tokenizer.specials if tokenizer else {}
    if tokenizer and "eos_token" not in names and (end := next((name for name in ENDS if name in specials), None)):
        names["eos_token"] = end
    bos = next((name for name, i in specials.items() if tokenizer and i == tokenizer.bos_id), "")
    return ChatTemplate(source, names, bos, tuple(sorted(specials, key=lambda name: (-len(name), name))))


def _has_template(data: DataConfig) -> bool:
    """Whether a template writes the messages; otherwise prompts and responses stay unchanged."""
    return bool(data.messages_key or data.chat_template)


def _message(role: str, content: str, template: str) -> tuple[TextPiece, TextPiece]:
    """The opening of a message, and its content with the text that ends it."""
    (before, opens), (after, ends) = (_filled(part, role) for part in template.split("{content}"))
    shifted = tuple((start + len(content), stop + len(content)) for start, stop in ends)
    return TextPiece(before, False, opens), TextPiece(content + after, role == LEARNED, shifted)


def _filled(part: str, role: str) -> tuple[str, Spans]:
    """A part of the template with the role filled in, and its spans of markup. A role that is data is not markup."""
    if role in TEMPLATE_ROLES:
        text = part.replace("{role}", role)
        return text, ((0, len(text)),)
    text, spans = "", ()
    for i, fragment in enumerate(part.split("{role}")):
        text += role if i else ""
        spans += ((len(text), len(text) + len(fragment)),)
        text += fragment
    return text, spans
