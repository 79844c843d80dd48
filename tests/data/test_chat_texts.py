"""Chats as one text, for programs that read prompts as text: with the answer opened, or up to a message's end."""

import pytest

from jaxlm.config import UserError
from jaxlm.data.sources.conversations import chat_text
from jaxlm.data.sources.jinja_templates import ChatTemplate
from tests.chats import FAMILIES, TOKENS

TURNS = [{"role": "user", "content": "1 + 1?"}, {"role": "assistant", "content": "Two: "}]
SYSTEM = {"role": "system", "content": "Be brief."}


def jinja(name: str) -> ChatTemplate:
    return ChatTemplate(FAMILIES[name], TOKENS, "<s>", ())


def test_a_template_of_a_text():
    template = "<{role}> {content}\n"
    assert chat_text(TURNS[:1], template, True) == "<user> 1 + 1?\n<assistant> "
    assert chat_text(TURNS, template, True) == "<user> 1 + 1?\n<assistant> Two: \n<assistant> "
    assert chat_text(TURNS, template, False) == "<user> 1 + 1?\n<assistant> Two: "


def test_a_jinja_template():
    opened = "<s><start_of_turn>user\n1 + 1?<end_of_turn>\n<start_of_turn>model\n"
    assert chat_text(TURNS[:1], jinja("gemma"), True) == opened
    assert chat_text(TURNS, jinja("gemma"), False) == f"{opened}Two:"  # which strips messages
    assert chat_text(TURNS, jinja("llama2"), False) == "<s>[INST] 1 + 1? [/INST] Two: "
    said = "<|user|>1 + 1?<|end|>\n<|assistant|>"
    assert chat_text(TURNS, jinja("marked"), False) == f"{said}Two: "
    assert chat_text(TURNS, jinja("marked"), True) == f"{said}Two: <|end|>\n<|assistant|>"
    with pytest.raises(UserError, match="System role not supported"):
        chat_text([SYSTEM, *TURNS], jinja("gemma"), True)
    with pytest.raises(UserError, match="leaves out the last message"):
        chat_text(TURNS, ChatTemplate("{{ messages[0].content }}", TOKENS, "", ()), False)
