"""Chat templates built as those of well-known families, and tokenizers that have their special tokens."""

import json
from typing import Any

from tests.tokenizing import hf_spec

# Each writes what its family's template writes for texts, in its own words.
FAMILIES = {
    "chatml": (  # SmolLM2, Qwen2: a system message of its own where the chat has none
        "{% for message in messages %}"
        "{% if loop.first and message.role != 'system' %}{{ '<|im_start|>system\nBe helpful.<|im_end|>\n' }}{% endif %}"
        "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
    "qwen3": (  # the last answer begins with an empty thought, and thoughts of earlier answers are left out
        "{%- set ns = namespace(last=-1) %}"
        "{%- for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
        "{%- for message in messages %}"
        "{%- set content = message.content %}{% set thought = '' %}"
        "{%- if message.role == 'assistant' and '</think>' in content %}"
        "{%- set thought = content.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
        "{%- set content = content.split('</think>')[-1].lstrip('\n') %}{%- endif %}"
        "{{- '<|im_start|>' + message.role + '\n' }}"
        "{%- if message.role == 'assistant' and loop.index0 > ns.last %}"
        "{{- '<think>\n' + thought + '\n</think>\n\n' }}{% endif %}"
        "{{- content + '<|im_end|>\n' }}{%- endfor %}"
        "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
    ),
    "llama3": (
        "{{- bos_token }}\n"
        "{%- if not date_string is defined %}{% if strftime_now is defined %}"
        "{%- set date_string = strftime_now('%d %b %Y') %}{% endif %}{% endif %}\n"
        "{{- '<|start_header_id|>system<|end_header_id|>\n\nToday Date: ' + date_string + '\n\n<|eot_id|>' }}\n"
        "{%- for message in messages %}\n"
        "    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' "
        "+ message['content'] | trim + '<|eot_id|>' }}\n"
        "{%- endfor %}\n"
        "{%- if add_generation_prompt %}\n"
        "    {{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}\n"
        "{%- endif %}\n"
    ),
    "llama2": (
        "{% for message in messages %}"
        "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('Roles must alternate user/assistant') }}{% endif %}"
        "{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + message['content'].strip() + ' [/INST]' }}"
        "{% else %}{{ ' ' + message['content'].strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
    ),
    "gemma": (
        "{{ bos_token }}{% for message in messages %}"
        "{% if message['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
        "{% set role = 'model' if message['role'] == 'assistant' else message['role'] %}"
        "{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{'<start_of_turn>model\n'}}{% endif %}"
    ),
    "phi3": (  # the end of the text closes the last answer
        "{% for message in messages %}{{'<|' + message['role'] + '|>\n' + message['content'] + '<|end|>\n'}}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
    ),
    "marked": (
        "{% for message in messages %}{% if message['role'] == 'assistant' %}"
        "{{ '<|assistant|>' }}{% generation %}{{ message['content'] + '<|end|>' }}{% endgeneration %}{{ '\n' }}"
        "{% else %}{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
    ),
}
# A system message that is put into the last message of the user: the text before an answer depends on what follows.
UNSTABLE = (
    "{% for message in messages %}{% if message.role == 'user' %}"
    "{{ '[INST]' }}{% if loop.last or loop.nextitem == messages[-1] %}{{ 'Be brief. ' }}{% endif %}"
    "{{ message.content + '[/INST]' }}{% else %}{{ message.content + eos_token }}{% endif %}{% endfor %}"
)
NAMES = ("<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>",
         "<start_of_turn>", "<end_of_turn>", "<|user|>", "<|assistant|>", "<|system|>", "<|end|>")  # fmt: skip
TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}


def chat_spec() -> dict[str, Any]:
    """The tokenizer.json of a byte-level tokenizer with the special tokens of all families, which changes no text."""
    spec = hf_spec("byte-level")
    spec["normalizer"], spec["pre_tokenizer"]["add_prefix_space"] = None, False
    spec["post_processor"] = spec["truncation"] = spec["padding"] = None
    for i, name in enumerate(NAMES, 1001):
        keys = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        spec["added_tokens"].append({"id": i, "content": name, "special": True, **keys})
    spec["added_tokens"] = [token for token in spec["added_tokens"] if token["content"] != "self."]
    return spec


def turns(*said: str, system: str = "") -> list[dict[str, str]]:
    """Messages of the user and the assistant in turns."""
    found = [{"role": "system", "content": system}] if system else []
    return found + [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(said)]


def config_file(template: str) -> bytes:
    """A tokenizer_config.json as models ship it."""
    content = {**TOKENS, "eos_token": {"content": "</s>", "lstrip": False}, "pad_token": None}
    return json.dumps({**content, "chat_template": template}).encode()
