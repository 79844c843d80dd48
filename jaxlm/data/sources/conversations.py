"""Writes conversations as text with a chat template. A run trains only on the assistant's messages."""

from typing import Any, NamedTuple

from jaxlm.config import DataConfig, UserError

LEARNED = "assistant"  # the role whose messages are trained on
ASKS = "user"
TEMPLATE_ROLES = ("system", ASKS, LEARNED)  # markup, as the template itself is; any other role is data

Spans = tuple[tuple[int, int], ...]


class TextPiece(NamedTuple):
    """A text that is tokenized as a whole; `learned` says whether it is trained on."""

    text: str
    learned: bool
    markup: Spans = ()  # characters [start, stop) that the template wrote: special tokens are recognized there


def conversation(messages: Any, key: str, template: str) -> list[TextPiece]:
    """Returns the pieces of a conversation, without what follows the assistant's last message.

    Args:
      messages: [{"role": ..., "content": ...}, ...].
      key: the name of `messages` in errors.
      template: writes one message and holds {role} and {content}. The text after {content} belongs to the content,
        so that a model learns where to stop.

    Raises:
      UserError: `messages` is not a list of messages with texts, or none is the assistant's. The error's text
        continues a line that begins with the record's name.
    """
    pieces: list[TextPiece] = []
    if not isinstance(messages, list):
        raise UserError(f": '{key}' is {type(messages).__name__}; allowed: a list of messages with role and content")
    for i, message in enumerate(messages):
        found = message if isinstance(message, dict) else {}
        for name in ("role", "content"):
            if not isinstance(found.get(name), str):
                raise UserError(f": '{key}' message {i} has no text '{name}'; allowed: messages with role and content")
            if "\0" in found[name]:
                raise UserError(f": '{key}' message {i} holds a NUL character; allowed: text")
        pieces += _message(found["role"], found["content"], template)
    while pieces and not pieces[-1].learned:
        pieces.pop()
    if not pieces:
        raise UserError(f": '{key}' has no message of role '{LEARNED}', so there is nothing to train on")
    pieces = [piece for piece in pieces if piece.text]
    if not pieces:
        raise UserError(f": '{key}' is empty; allowed: texts")
    return pieces


def trains_on_answers(data: DataConfig) -> bool:
    """Whether a run trains on answers to prompts instead of whole texts."""
    return bool(data.messages_key or data.response_key)


def question(prompt: str, data: DataConfig) -> list[TextPiece]:
    """The pieces of a user's message and of the opening of the answer."""
    if not _has_template(data):
        return [TextPiece(prompt, False)]
    opening = _message(LEARNED, "", data.chat_template)[0]
    return [piece for piece in (*_message(ASKS, prompt, data.chat_template), opening) if piece.text]


def after_answer(data: DataConfig) -> tuple[str, str]:
    """The text that the template writes after an answer, and the text that opens the user's next message."""
    if not _has_template(data):
        return "", ""
    return _message(LEARNED, "", data.chat_template)[1].text, _message(ASKS, "", data.chat_template)[0].text


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
