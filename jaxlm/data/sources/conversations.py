"""Conversations as text: a template formats each message, and only the assistant's words are trained on."""

from typing import Any, NamedTuple

from jaxlm.config import DataConfig, UserError

LEARNED = "assistant"  # the role whose words are trained on
ASKS = "user"
TEMPLATE_ROLES = ("system", ASKS, LEARNED)  # parts of the template itself; the name of any other role is data

Spans = tuple[tuple[int, int], ...]


class TextPiece(NamedTuple):
    """A text that is tokenized as one."""

    text: str
    learned: bool  # whether it is trained on
    markup: Spans = ()  # characters [start, stop) from the template, in which special tokens are recognized


def conversation(messages: Any, key: str, template: str) -> list[TextPiece]:
    """Returns the pieces of a conversation, up to the assistant's last words.

    Args:
      messages: [{"role": ..., "content": ...}, ...].
      key: names the messages in errors.
      template: of one message, with {role} and {content}. The text after {content} counts as content, so that the model
        learns where to stop.

    Raises:
      UserError: these are not messages, or none is the assistant's. The error's text follows the record's name.
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
        raise UserError(f": '{key}' has no message of role '{LEARNED}', so nothing to train on")
    pieces = [piece for piece in pieces if piece.text]
    if not pieces:
        raise UserError(f": '{key}' is empty; allowed: texts")
    return pieces


def trains_on_answers(data: DataConfig) -> bool:
    """Whether a run trains on answers to prompts instead of whole texts."""
    return bool(data.messages_key or data.response_key)


def question(prompt: str, data: DataConfig) -> list[TextPiece]:
    """Returns the pieces of a user's message, up to the beginning of the answer."""
    if not _has_template(data):
        return [TextPiece(prompt, False)]
    opening = _message(LEARNED, "", data.chat_template)[0]
    return [piece for piece in (*_message(ASKS, prompt, data.chat_template), opening) if piece.text]


def after_answer(data: DataConfig) -> tuple[str, str]:
    """Returns the template's text after an answer, and its text before the user's next message."""
    if not _has_template(data):
        return "", ""
    return _message(LEARNED, "", data.chat_template)[1].text, _message(ASKS, "", data.chat_template)[0].text


def _has_template(data: DataConfig) -> bool:
    """Whether a template formats the messages; otherwise prompts and responses are used as they are."""
    return bool(data.messages_key or data.chat_template)


def _message(role: str, content: str, template: str) -> tuple[TextPiece, TextPiece]:
    """Returns the template's text before a message, and the content with the text after it."""
    (before, opens), (after, ends) = (_filled(part, role) for part in template.split("{content}"))
    shifted = tuple((start + len(content), stop + len(content)) for start, stop in ends)
    return TextPiece(before, False, opens), TextPiece(content + after, role == LEARNED, shifted)


def _filled(part: str, role: str) -> tuple[str, Spans]:
    """Fills a role into a part of the template. Returns the text, and which spans of it are markup."""
    if role in TEMPLATE_ROLES:
        text = part.replace("{role}", role)
        return text, ((0, len(text)),)
    text, spans = "", ()
    for i, fragment in enumerate(part.split("{role}")):
        text += role if i else ""
        spans += ((len(text), len(text) + len(fragment)),)
        text += fragment
    return text, spans
