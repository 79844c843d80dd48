"""Tokenizers of pretrained models: Hugging Face's `tokenizer.json`, read with the `tokenizers` library.

Bits per byte need the exact bytes that every id stands for. Loading a file therefore turns off the steps that change a
text: a space put before the text, NFC, and stripping around added tokens. Ids differ from those of `transformers` only
where one of these steps would have acted. A file that changes texts in other ways is refused, and each text is compared
with the bytes that its ids stand for.

Special tokens are markup between texts. The name of one inside a text ("<|endoftext|>") is plain text; in the text that
a chat template writes, it becomes the token's id (markup.py).
"""

import contextlib
import itertools
import json
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np

from jaxlm.config import DataConfig, UserError, show
from jaxlm.data.tokenizers.base import Spaces, Texts, Tokenizer, to_bytes, write_spec
from jaxlm.data.tokenizers.shipped import write_beside

FILE = "tokenizer.json"
# Names of the token that opens a document in families of models or, in families without one, separates documents.
# The first that a tokenizer has is its bos.
BOS = (
    "<s>",
    "<bos>",
    "<|begin_of_text|>",
    "<|startoftext|>",
    "<|bos|>",
    "[BOS]",
    "<BOS_TOKEN>",
    "<BOS>",
    "<|bos_token|>",
    "<｜begin▁of▁sentence｜>",
    "<|begin_of_sentence|>",
    "<|endoftext|>",
    "<|end_of_text|>",
)
# Names of the tokens that end a document or an answer.
ENDS = (
    "</s>",
    "<eos>",
    "<|eos|>",
    "[EOS]",
    "<|endoftext|>",
    "<|end_of_text|>",
    "<|end_of_sentence|>",
    "<｜end▁of▁sentence｜>",
    "<|eot_id|>",
    "<|im_end|>",
    "<|end|>",
    "<end_of_turn>",
    "<|END_OF_TURN_TOKEN|>",
)
SURROGATES = re.compile("([\ud800-\udfff]+)")  # the library accepts no text that holds them
SURROGATES_OR_SPACE_SIGN = re.compile("([\u2581\ud800-\udfff]+)")  # some files write a space as U+2581
BYTE_PIECES = tuple(f"<0x{i:02X}>" for i in range(256))


class HfTokenizer(Tokenizer):
    """A byte-level tokenizer (GPT-2, Llama 3, Qwen) or one with byte fallback (Llama 2, Mistral, Gemma)."""

    library = "tokenizers"

    def __init__(self, content: bytes, name: str):
        """Loads a tokenizer from the `content` of a tokenizer.json; errors call it `name`.

        Raises:
          UserError: the file is unreadable, has no bos, or its ids do not stand for fixed bytes.
        """
        import tokenizers

        try:
            spec = json.loads(content)
            spaces = _spaces(spec)
            alphabet = _keep_bytes(spec, name)
            self._library = tokenizers.Tokenizer.from_str(json.dumps(spec))
            added = {token["content"]: token for token in spec["added_tokens"]}
            vocab = self._library.get_vocab(with_added_tokens=True)
        except UserError:
            raise
        except BaseException as error:  # the library raises nothing narrower
            if not (isinstance(error, Exception) or _panicked(error)):
                raise
            reason = show(" ".join(str(error).split()) or type(error).__name__)
            raise UserError(
                f"{name}: not a Hugging Face tokenizer.json ({reason}); allowed: one that `tokenizers` "
                f"{tokenizers.__version__} reads"
            ) from error
        special = {text for text, token in added.items() if token["special"]}
        bos = next((text for text in BOS if text in special), None)
        if bos is None:
            raise UserError(
                f"{name}: its special tokens are {show(sorted(special))}; allowed: one that opens "
                f"a document ({' '.join(BOS)})"
            )
        size = max(vocab.values()) + 1
        if size > 2 * len(vocab) + 1000:
            raise UserError(f"{name}: an id of {size - 1} with {len(vocab)} pieces; allowed: ids without large gaps")
        pieces = [b""] * size
        for text, i in vocab.items():
            if text not in special:
                pieces[i] = _piece_bytes(text, alphabet, literal=text in added)
        super().__init__(pieces, vocab[bos])
        self.specials = {text: vocab[text] for text in special if text not in BYTE_PIECES}
        self.end_ids |= {vocab[text] for text in ENDS if text in special}
        self.spaces = spaces
        self._content, self._name = content, name
        self._library.encode_special_tokens = True  # their names are plain text
        self._as_bytes = SURROGATES if alphabet else SURROGATES_OR_SPACE_SIGN
        self._byte_ids = [vocab[c] for c in alphabet or BYTE_PIECES]
        # Some models match the names of special and byte pieces in a text. `_encode_names` cuts the names in two, so
        # that they do not match.
        names = [*special, *([] if alphabet else BYTE_PIECES)]
        self._names = re.compile(f"(?=({'|'.join(re.escape(name) for name in names)}))")

    def encode(self, texts: list[str]) -> list[np.ndarray]:
        """The int32 ids of each text. Raises UserError if they stand for another text."""
        parts: list[str] = []
        ends = [0]
        as_bytes: dict[int, list[int]] = {}  # index of a part: its ids
        for text in texts:
            for i, part in enumerate([text] if text.isascii() else self._as_bytes.split(text)):
                if i % 2:
                    as_bytes[len(parts)] = [self._byte_ids[b] for b in to_bytes(part)]
                    part = ""
                parts.append(part)
            ends.append(len(parts))
        ids = self._encode(parts)
        for i, part in enumerate(parts):
            if not self._stands_for(ids[i], part):
                ids[i] = self._encode_names(part)
        for i, byte_ids in as_bytes.items():
            ids[i] = byte_ids
        return [np.fromiter(itertools.chain.from_iterable(ids[a:b]), np.int32) for a, b in itertools.pairwise(ends)]

    def _encode(self, texts: list[str]) -> list[list[int]]:
        try:
            with _parallel(self.num_threads > 1):
                encodings = self._library.encode_batch_fast(texts, add_special_tokens=False)
        except BaseException as error:
            if type(error) is not Exception and not _panicked(error):  # the library raises plain Exception, or panics
                raise
            raise UserError(f"{self._name}: `tokenizers` cannot encode a text with it ({show(str(error))})") from error
        return [encoding.ids for encoding in encodings]

    def _encode_names(self, text: str) -> list[int]:
        """The ids of a text that holds names of special or byte pieces, as plain text."""
        cuts = [match.start() + 1 for match in self._names.finditer(text)]
        parts = [text[a:b] for a, b in itertools.pairwise([0, *cuts, len(text)])]
        ids = list(itertools.chain.from_iterable(self._encode(parts)))
        if not self._stands_for(ids, text):
            raise UserError(
                f"{self._name}: changes the text {show(text)}; allowed: a tokenizer whose ids stand for the same text"
            )
        return ids

    def _stands_for(self, ids: list[int], text: str) -> bool:
        return b"".join(map(self.pieces.__getitem__, ids)) == to_bytes(text)

    def save(self, folder: Path) -> None:
        (folder / FILE).write_bytes(self._content)
        write_beside(folder, self.beside)
        write_spec(folder, {"kind": "hf"})

    @classmethod
    def load(cls, folder: Path, spec: dict[str, Any]) -> "HfTokenizer":
        return cls((folder / FILE).read_bytes(), str(folder / FILE))

    @classmethod
    def make(cls, data: DataConfig, train_texts: Texts, all_texts: Texts, say: Callable[[str], None]) -> "HfTokenizer":
        raise UserError("data.tokenizer_path is ''; allowed with data.tokenizer=hf: a tokenizer.json or its folder")


def _panicked(error: BaseException) -> bool:
    """Whether the error is a panic of the library, whose class derives from BaseException alone."""
    return type(error).__name__ == "PanicException"


@contextlib.contextmanager
def _parallel(on: bool) -> Iterator[None]:
    """Makes the library use all threads or one, by the environment variable that it reads at every call."""
    key = "TOKENIZERS_PARALLELISM"
    before = os.environ.get(key)
    os.environ[key] = "true" if on else "false"
    try:
        yield
    finally:
        if before is None:
            del os.environ[key]
        else:
            os.environ[key] = before


def _byte_alphabet() -> list[str]:
    """The character that GPT-2's vocabulary writes for each byte: itself if visible, else one from U+0100 on."""
    visible = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = itertools.count(0x100)
    return [chr(b if b in visible else next(others)) for b in range(256)]


BYTE_ALPHABET = _byte_alphabet()
BYTE_OF = {c: b for b, c in enumerate(BYTE_ALPHABET)}


def _piece_bytes(text: str, alphabet: list[str], literal: bool) -> bytes:
    """The bytes of the piece that the vocabulary writes as `text`. In a byte-level one, added tokens are `literal`."""
    if alphabet:
        return to_bytes(text) if literal or not all(c in BYTE_OF for c in text) else bytes(BYTE_OF[c] for c in text)
    return bytes([int(text[3:5], 16)]) if text in BYTE_PIECES else to_bytes(text.replace("\u2581", " "))


def _keep_bytes(spec: dict[str, Any], name: str) -> list[str]:
    """Removes the steps that change texts from `spec`, the content of a tokenizer.json.

    Returns:
      The characters that a byte-level vocabulary writes for the 256 bytes; [] for a vocabulary with byte fallback.

    Raises:
      UserError: other steps change texts, or some bytes have no piece.
    """

    def require(ok: bool, key: str, found: Any, allowed: str) -> None:
        if not ok:
            raise UserError(f"{name}: {key} is {show(found)}; allowed: {allowed}")

    model, splits = spec["model"], _steps(spec.get("pre_tokenizer"), "pretokenizers")
    kind = model.get("type", "BPE" if "merges" in model else None)  # old files do not name BPE
    require(kind in ("BPE", "Unigram"), "model.type", kind, "BPE, Unigram")
    byte_level = any(step["type"] == "ByteLevel" for step in splits)
    require(
        byte_level or model.get("byte_fallback") is True,
        "model.byte_fallback",
        model.get("byte_fallback"),
        "true, or a pre_tokenizer ByteLevel: otherwise some texts have no ids",
    )
    for key in ("continuing_subword_prefix", "end_of_word_suffix"):
        require(not model.get(key), f"model.{key}", model.get(key), "none")
    vocab = model["vocab"] if kind == "BPE" else {piece for piece, _ in model["vocab"]}
    alphabet = BYTE_ALPHABET if byte_level else []
    missing = sum(piece not in vocab for piece in alphabet or BYTE_PIECES)
    require(
        not missing, "model.vocab", f"without {missing} of the 256 bytes", "all of them, so that every text has ids"
    )

    for step in splits:
        removes = step.get("behavior") == "Removed"
        safe = ("Split", "Punctuation", "Digits", "UnicodeScripts", "ByteLevel" if byte_level else "Metaspace")
        found, allowed = step["type"] + " Removed" * removes, f"{', '.join(safe)} that remove nothing"
        require(step["type"] in safe and not removes, "pre_tokenizer", found, allowed)
        if step["type"] == "ByteLevel":
            step["add_prefix_space"] = False
        if step["type"] == "Metaspace":
            require(step["replacement"] == "\u2581", "pre_tokenizer.replacement", step["replacement"], "\u2581")
            step.pop("add_prefix_space", None)
            step["prepend_scheme"] = "never"
    steps = _steps(spec.get("normalizer"), "normalizers")
    kept = [step for step in steps if step["type"] not in ("NFC", "Prepend")]
    for step in kept:
        space = not byte_level and (step.get("pattern"), step.get("content")) == ({"String": " "}, "\u2581")
        allowed = "NFC, Prepend, and with byte fallback Replace of a space by \u2581; others change texts"
        require(step["type"] == "Replace" and space, "normalizer", step["type"], allowed)
    for token in spec["added_tokens"]:
        token["lstrip"] = token["rstrip"] = False
    model["dropout"] = None
    spec["normalizer"] = {"type": "Sequence", "normalizers": kept} if kept else None
    spec["truncation"] = spec["padding"] = spec["post_processor"] = None
    return alphabet


def _spaces(spec: dict[str, Any]) -> Spaces:
    """How a tokenizer.json changes the spaces around special tokens."""
    added = spec["added_tokens"]
    adds: Literal["never", "always", "missing"] = "never"
    if any(step["type"] == "Prepend" for step in _steps(spec.get("normalizer"), "normalizers")):
        adds = "always"
    for step in _steps(spec.get("pre_tokenizer"), "pretokenizers"):
        if step["type"] == "Metaspace" and step.get("prepend_scheme", "always") == "always":
            adds = "missing" if step.get("add_prefix_space", True) else adds
    after, before = (frozenset(token["content"] for token in added if token.get(side)) for side in ("rstrip", "lstrip"))
    return Spaces(after, before, adds)


def _steps(part: dict[str, Any] | None, key: str) -> list[dict[str, Any]]:
    """The steps of a normalizer or pre-tokenizer, in order; `key` names the steps of a Sequence."""
    if part is None:
        return []
    return [s for child in part[key] for s in _steps(child, key)] if part["type"] == "Sequence" else [part]
