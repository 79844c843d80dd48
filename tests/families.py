"""Small tokenizers built as the tokenizer.json of well-known families, and a text that is hard for tokenizers."""

import functools
import json
from typing import Any

from tests.tokenizing import CODE

# Code, whitespace, emoji with joiners, right-to-left text with marks, digits, names of special tokens and of bytes.
HARD_SAMPLE = (
    "def f(x):\n\treturn x  # don't\r\n\r\n    if x >= 10_000:\n        print('I\u2019m', \"you'LL\", 3.14159)\n\n\n"
    "  leading and trailing   \n"
    "👩\u200d👩\u200d👧\u200d👦 🏳️\u200d🌈 👍🏽 😀😀\n"
    "مرحبا بالعالم، كَيْفَ حالُك؟ שָׁלוֹם עוֹלָם \u202babc\u202c\n"
    "你好，世界。これはテストです。한국어 ไทย हिन्दी Ελληνικά\n"
    "naïve café Ångström ﬁ \u00a0\u2003\u3000\u200b\ufeff tab\tend 1234567 ①②½ x²\n"
    "[INST] <s> </s> <0x41> <|im_end|> <unk> <tool_call> \U000e0001 \U0010ffff end"
)
# To train on.
SCRIPTS = "".join(
    f"مرحبا {a} 你好世界 {b} 👩\u200d👧 שלום 한국어\n" for a in "سلام 😀" for b in "é世ή한"
)  # to train on
NOT_NFC = "cafe\u0301 A\u030angstro\u0308m"  # Qwen's tokenizers compose these letters

# The patterns at which byte-level families cut a text before merging: words, numbers, punctuation, spaces.
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
FALLBACK = [f"<0x{i:02X}>" for i in range(256)]
SIGN = "\u2581"
# Family: names of special tokens, the first of which opens documents; names of other added tokens.
ADDED = {
    "gpt2": (["<|endoftext|>"], []),
    "smollm2": (["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<repo_name>"], []),
    "llama3": (["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"], []),
    "qwen": (["<|endoftext|>", "<|im_start|>", "<|im_end|>"], ["<tool_call>", "</tool_call>", "<think>", "</think>"]),
    "phi4": (["<|endoftext|>", "<|user|>", "<|assistant|>", "<|end|>"], []),
    "llama2": (["<s>", "<unk>", "</s>"], []),
    "phi3": (["<s>", "<unk>", "<|endoftext|>", "<|user|>", "<|assistant|>", "<|end|>"], ["</s>"]),
    "mistral": (["<s>", "<unk>", "</s>", "[INST]", "[/INST]"], []),
    "gemma": (["<bos>", "<unk>", "<eos>", "<start_of_turn>", "<end_of_turn>"], ["\n\n", "\n\n\n", "\t\t", "<table>"]),
}
STRIPS = ("<|end|>", "<|user|>", "<|assistant|>")  # Phi's tokens take the spaces after them


@functools.cache
def family(name: str) -> str:
    """The tokenizer.json of a small tokenizer that is built as the family's."""
    from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers
    from tokenizers import Tokenizer as Library

    special, others = ADDED[name]
    byte_level = name in ("gpt2", "smollm2", "llama3", "qwen", "phi4")
    cut: Any = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=name in ("gpt2", "smollm2"))
    if name == "smollm2":
        cut = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), cut])
    elif name in ("llama3", "qwen", "phi4"):
        words = Regex(WORDS % ("" if name == "qwen" else "{1,3}"))
        cut = pre_tokenizers.Sequence([pre_tokenizers.Split(words, "isolated", invert=False), cut])
    library: Any = Library(models.BPE() if byte_level else models.BPE(unk_token="<unk>", byte_fallback=True))
    space = normalizers.Replace(" ", SIGN)
    if name == "mistral":
        library.pre_tokenizer = pre_tokenizers.Metaspace(replacement=SIGN, prepend_scheme="first", split=False)
    elif name == "gemma":
        library.normalizer = space
        library.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous", invert=False)
    elif not byte_level:
        library.normalizer = normalizers.Sequence([normalizers.Prepend(SIGN), space])
    else:
        library.normalizer = normalizers.NFC() if name == "qwen" else None
        library.pre_tokenizer = cut
    texts = [line + "\n" for line in (CODE + SCRIPTS).split("\n")]
    trainer = trainers.BpeTrainer(
        vocab_size=1200 if byte_level else 1500,
        special_tokens=[] if byte_level else [*special, *FALLBACK],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet() if byte_level else [],
        show_progress=False,
    )
    library.train_from_iterator(texts, trainer)
    library.add_special_tokens([AddedToken(n, normalized=False, rstrip=n in STRIPS, special=True) for n in special])
    library.add_tokens([AddedToken(n, normalized=False, rstrip=n == "</s>", special=False) for n in others])
    library.decoder = decoders.ByteLevel() if byte_level else decoders.Sequence(
        [decoders.Replace(SIGN, " "), decoders.ByteFallback(), decoders.Fuse()])  # fmt: skip
    if name in ("llama3", "llama2", "mistral", "gemma"):
        bos = (special[0], library.token_to_id(special[0]))
        library.post_processor = processors.TemplateProcessing(single=f"{bos[0]} $A", special_tokens=[bos])
    spec = json.loads(library.to_str())
    spec["added_tokens"] = [token for token in spec["added_tokens"] if token["content"] not in FALLBACK]
    spec["model"]["ignore_merges"] = name == "llama3"
    spec["model"]["fuse_unk"] = not byte_level
    return json.dumps(spec)
