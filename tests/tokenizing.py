"""Texts that are difficult for tokenizers, and Hugging Face tokenizers of each kind."""

import json
import sysconfig
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import strategies as st

from jaxlm.data.tokenizers.base import Tokenizer, to_bytes

CODE = (Path(sysconfig.get_paths()["stdlib"]) / "argparse.py").read_text("utf-8")
ANYTHING = st.text(st.characters(exclude_categories=[]), max_size=60)  # includes surrogates and unassigned code points
HARD = st.lists(
    st.sampled_from(
        ["\u2581", " ", "\n", "\r\n", "\t", "\0", "\ud800", "\udc00", "\u2585", "é", "e\u0301", "漢", "\U0001f600",
         "def ", "self.", "<0x41>", "<s>", "<unk>", "<|endoftext|>", "<", "s>",
         "\ufeff", "\ufffd", "\u00a0", "\u3000", "ﬁ", "\x1b", "\n    "]
    ),
    max_size=30,
).map("".join)  # fmt: skip


def check(tokenizer: Tokenizer, text: str) -> None:
    (ids,) = tokenizer.encode([text])
    assert ids.dtype == np.int32 and ids.ndim == 1
    assert tokenizer.bos_id not in ids
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode(ids.tolist()) == text
    assert tokenizer.bytes_per_token()[ids].sum() == len(to_bytes(text))


def hf_spec(kind: str) -> dict[str, Any]:
    """Trains a small tokenizer and returns its tokenizer.json, with all options that change texts, as in the wild."""
    from tokenizers import Tokenizer as Library
    from tokenizers import models, normalizers, pre_tokenizers, processors, trainers

    markup = ["<unk>", "<s>"]
    fallback = [f"<0x{i:02X}>" for i in range(256)]
    sign = "\u2581"
    if kind == "byte-level":
        library: Any = Library(models.BPE())  # Any, because the type stubs have properties without setters
        library.normalizer = normalizers.NFC()
        library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(
            vocab_size=600, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
        )
    elif kind == "byte fallback":
        library = Library(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
        library.normalizer = normalizers.Sequence([normalizers.Prepend(sign), normalizers.Replace(" ", sign)])
        trainer = trainers.BpeTrainer(vocab_size=700, special_tokens=markup + fallback, show_progress=False)
    else:
        library = Library(models.Unigram())
        library.pre_tokenizer = pre_tokenizers.Metaspace()
        trainer = trainers.UnigramTrainer(
            vocab_size=400, unk_token="<unk>", special_tokens=markup + fallback, show_progress=False
        )
    library.train_from_iterator(CODE.splitlines(), trainer)
    bos = "<|endoftext|>" if kind == "byte-level" else "<s>"
    template = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, library.token_to_id(bos))])
    library.post_processor = template
    library.enable_truncation(5)
    library.enable_padding(length=7)
    spec = json.loads(library.to_str())
    spec["added_tokens"] = [token for token in spec["added_tokens"] if token["content"] not in fallback]
    literal = {
        "id": 1000,
        "content": "self.",
        "single_word": False,
        "lstrip": True,
        "rstrip": True,
        "normalized": False,
        "special": False,
    }
    spec["added_tokens"].append(literal)
    if kind == "metaspace":
        spec["model"]["byte_fallback"] = True
    return spec


HF_KINDS = ("byte-level", "byte fallback", "metaspace")
