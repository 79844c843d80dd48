"""Conversations as text: what is said is put into a template, and what the assistant says is to be learned."""

from typing import Any

from jaxlm.config import UserError

LEARNED = "assistant"  # the role whose words are learned


def conversation(messages: Any, key: str, template: str) -> list[tuple[str, bool]]:
    """The texts of a conversation and whether each is to be learned.

    Args:
      messages: [{"role": ..., "content": ...}, ...].
      key: what errors call them.
      template: of one message, with {role} and {content}. What follows {content} belongs to it, so that a model
        learns where to stop.

    What comes after the assistant's last words is left out: nothing is learned there.

    Raises:
      UserError: they are not messages, or none is the assistant's; says what comes after the record's name.
    """
    before, after = template.split("{content}")
    texts: list[tuple[str, bool]] = []
    if not isinstance(messages, list):
        raise UserError(f": '{key}' is {type(messages).__name__}; allowed: a list of messages with role and content")
    for i, message in enumerate(messages):
        found = message if isinstance(message, dict) else {}
        for name in ("role", "content"):
            if not isinstance(found.get(name), str):
                raise UserError(f": '{key}' message {i} has no text '{name}'; allowed: messages with role and content")
            if "\0" in found[name]:
                raise UserError(f": '{key}' message {i} holds a NUL character; allowed: text")
        learned = found["role"] == LEARNED
        start, end = (part.replace("{role}", found["role"]) for part in (before, after))
        texts += [(start, False), (found["content"] + end, learned)]
    while texts and not texts[-1][1]:
        texts.pop()
    if not texts:
        raise UserError(f": '{key}' has no message of role '{LEARNED}', so nothing to learn")
    texts = [(text, learned) for text, learned in texts if text]
    if not texts:
        raise UserError(f": '{key}' is empty; allowed: texts")
    return texts
