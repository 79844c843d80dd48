"""Conversations as text: a template writes each message, and what the assistant says is learned."""

from typing import Any, NamedTuple

from jaxlm.config import DataConfig, UserError

LEARNED = "assistant"  # the role whose words are learned
ASKS = "user"
TEMPLATE_ROLES = ("system", ASKS, LEARNED)  # count as the template's own words; any other role is data

Spans = tuple[tuple[int, int], ...]


class TextPiece(NamedTuple):
    """A text that is tokenized as a whole."""

    text: str
    learned: bool
    markup: Spans = ()  # the characters [start, stop) that the template wrote, where special tokens are recognized


def conversation(messages: Any, key: str, template: str) -> list[TextPiece]:
    """The pieces of a conversation.

    Args:
      messages: [{"role": ..., "content": ...}, ...].
      key: what errors call them.
      template: of one message, with {role} and {content}. What follows {content} belongs to it, so that a model
        learns where to stop.

    What comes after the assistant's last words is left out: nothing is learned there.

    Raises:
      UserError: they are not messages, or none is the assistant's; says what comes after the record's name.
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
        raise UserError(f": '{key}' has no message of role '{LEARNED}', so nothing to learn")
    pieces = [piece for piece in pieces if piece.text]
    if not pieces:
        raise UserError(f": '{key}' is empty; allowed: texts")
    return pieces


def trains_on_answers(data: DataConfig) -> bool:
    """Whether a run learns answers to prompts instead of whole texts."""
    return bool(data.messages_key or data.response_key)


def question(prompt: str, data: DataConfig) -> list[TextPiece]:
    """The pieces of a user's message, up to where the answer begins."""
    if not _has_template(data):
        return [TextPiece(prompt, False)]
    opening = _message(LEARNED, "", data.chat_template)[0]
    return [piece for piece in (*_message(ASKS, prompt, data.chat_template), opening) if piece.text]


def after_answer(data: DataConfig) -> tuple[str, str]:
    """What the template writes after an answer, and what would open the user's next message."""
    if not _has_template(data):
        return "", ""
    return _message(LEARNED, "", data.chat_template)[1].text, _message(ASKS, "", data.chat_template)[0].text


def _has_template(data: DataConfig) -> bool:
    """Whether messages are written with a template; otherwise prompts and responses stay as they are."""
    return bool(data.messages_key or data.chat_template)


def _message(role: str, content: str, template: str) -> tuple[TextPiece, TextPiece]:
    """What opens a message, and its content with what ends it."""
    (before, opens), (after, ends) = (_filled(part, role) for part in template.split("{content}"))
    shifted = tuple((start + len(content), stop + len(content)) for start, stop in ends)
    return TextPiece(before, False, opens), TextPiece(content + after, role == LEARNED, shifted)


def _filled(part: str, role: str) -> tuple[str, Spans]:
    """A part of the template with its role, and which of it is markup."""
    if role in TEMPLATE_ROLES:
        text = part.replace("{role}", role)
        return text, ((0, len(text)),)
    text, spans = "", ()
    for i, fragment in enumerate(part.split("{role}")):
        text += role if i else ""
        spans += ((len(text), len(text) + len(fragment)),)
        text += fragment
    return text, spans
