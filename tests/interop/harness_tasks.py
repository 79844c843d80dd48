"""Small models with tokenizers for the evaluation harness, and tasks made of local files."""

import importlib
import json
from pathlib import Path
from typing import Any

from tests import chats
from tests.families import family

CONTEXT = 64
SIZES: dict[str, Any] = {"num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4,
                         "num_key_value_heads": 2, "max_position_embeddings": CONTEXT}  # fmt: skip
# Name: class of `transformers`, its sizes, names of bos and eos. GPT-2's and Qwen's tokenizers put no bos before texts.
MODELS: dict[str, tuple[str, dict[str, Any], dict[str, str]]] = {
    "gpt2": ("GPT2", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": CONTEXT},
             {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"}),
    "llama3": ("Llama", SIZES, {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"}),
    "qwen": ("Qwen2", SIZES, {"eos_token": "<|im_end|>"}),
}  # fmt: skip
CHATS = {"llama3": "llama3", "qwen": "chatml"}

QUESTIONS = [
    {"q": "def read(path):", "choices": ["return path", " raise", "\n    pass", "x"], "gold": 0},
    {"q": "你好 for i in range(10): ", "choices": ["print(i)", "yield", "break if i > 3 else continue"], "gold": 1},
    {"q": "import os " * 40, "choices": ["import sys", "the end"], "gold": 1},  # longer than the context
    {"q": "class A:", "choices": ["def f(self)", "def f(self): return 1", "A"], "gold": 2},
]
TASKS: dict[str, str] = {
    "local_choice": "output_type: multiple_choice\ndoc_to_text: '{{q}}'\ndoc_to_target: gold\ndoc_to_choice: choices\n"
    "metric_list:\n  - metric: acc\n  - metric: acc_norm\n",
    "local_rolling": "output_type: loglikelihood_rolling\ndoc_to_text: ''\ndoc_to_target: '{{q}}'\n"
    "metric_list:\n  - metric: word_perplexity\n  - metric: bits_per_byte\n",
    "local_generate": "output_type: generate_until\ndoc_to_text: '{{q}}'\ndoc_to_target: '{{choices[gold]}}'\n"
    "generation_kwargs:\n  until: ['e', 'def']\n  max_gen_toks: 12\n"
    "metric_list:\n  - metric: exact_match\n  - metric: chrf\n",
}


def write_tasks(folder: Path) -> Path:
    folder.mkdir()
    (folder / "questions.jsonl").write_text("".join(json.dumps(q) + "\n" for q in QUESTIONS))
    for name, rest in TASKS.items():
        files = f"dataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {folder / 'questions.jsonl'}\n"
        (folder / f"{name}.yaml").write_text(f"task: {name}\n{files}test_split: test\n{rest}metadata:\n  version: 1\n")
    return folder


def write_model(name: str, folder: Path) -> None:
    """Writes a random model, every parameter of which is away from its initial value, and its tokenizer."""
    torch, transformers = importlib.import_module("torch"), importlib.import_module("transformers")
    kind, sizes, names = MODELS[name]
    spec = json.loads(family(name))
    ids = {token["content"]: token["id"] for token in spec["added_tokens"]}
    rows = max(*spec["model"]["vocab"].values(), *ids.values()) + 1
    special = {f"{key}_id": ids[token] for key, token in names.items()} | {"pad_token_id": None}
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(vocab_size=rows, **sizes, **{"bos_token_id": None, **special})
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn_like(p))
        if name == "llama3":  # some continuations end
            model.lm_head.weight[ids[names["eos_token"]]] *= 8
    model.save_pretrained(folder)
    (folder / "tokenizer.json").write_text(json.dumps(spec))
    template = {"chat_template": chats.FAMILIES[CHATS[name]]} if name in CHATS else {}
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **names, **template})
    )
