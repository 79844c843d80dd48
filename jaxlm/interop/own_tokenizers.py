"""Writes the tokenizers that jaxlm trains as `tokenizer.json`, which `tokenizers` and `transformers` read.

The ids are jaxlm's own, for every text. In a sentencepiece model, U+2581 stands for a space. Here pieces hold the space
itself, so U+2581 in a text has no piece and becomes its three bytes, as in jaxlm.
"""

import importlib
import itertools
import json
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, processors

from jaxlm.data.tokenizers import Tokenizer
from jaxlm.data.tokenizers.base import ByteTokenizer, CharTokenizer
from jaxlm.data.tokenizers.hf import BYTE_ALPHABET, BYTE_PIECES
from jaxlm.data.tokenizers.sentencepiece import LINE, MAX_LINE, SentencePieceTokenizer

BOS, UNKNOWN = "<s>", "<unk>"
# The name of a special token in a text is plain text, and decoding changes no spaces.
CONFIG = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": BOS, "eos_token": BOS,
          "clean_up_tokenization_spaces": False, "split_special_tokens": True}  # fmt: skip
# Names that the unigram model of `tokenizers` would find in a text, as if they were pieces.
NAMES = (BOS, UNKNOWN, *BYTE_PIECES)


def write(tokenizer: Tokenizer, folder: Path) -> bool:
    """Writes `tokenizer.json` and `tokenizer_config.json` to a folder. Returns whether it is a tokenizer that jaxlm
    trains; another one has its own files.
    """
    if isinstance(tokenizer, SentencePieceTokenizer) and tokenizer.lossless:
        library, config = _sentencepiece(tokenizer), CONFIG | {"unk_token": UNKNOWN}
    elif isinstance(tokenizer, ByteTokenizer | CharTokenizer):
        library, config = (_bytes() if isinstance(tokenizer, ByteTokenizer) else _chars(tokenizer)), CONFIG
        tokenizer.save(folder)  # jaxlm itself reads these files again
    else:
        return False
    special = [AddedToken(name, special=True, normalized=False) for name in (BOS, UNKNOWN) if name in config.values()]
    library.add_special_tokens(special)
    library.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, tokenizer.bos_id)])
    library.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    return True


def _sentencepiece(tokenizer: SentencePieceTokenizer) -> Any:
    sp: Any = tokenizer.processor
    ordinary = [not (sp.is_byte(i) or sp.is_control(i) or sp.is_unknown(i)) for i in range(sp.vocab_size())]
    pieces = [sp.id_to_piece(i) for i in range(sp.vocab_size())]
    pieces = [piece.replace("\u2581", " ") if own else piece for piece, own in zip(pieces, ordinary, strict=True)]
    known = set(itertools.compress(pieces, ordinary))
    # As jaxlm cuts a text: what becomes bytes alone, lines, parts of lines.
    splits = ["[\u2581]" if " " in known else "[\u2581 ]", LINE.pattern, f"[\\s\\S]{{1,{MAX_LINE}}}"]
    scores = [sp.get_score(i) for i in range(sp.vocab_size())]
    model: models.Model
    if _is_bpe(sp.serialized_model_proto()):
        ranked = sorted(itertools.compress(zip(scores, pieces, strict=True), ordinary), reverse=True)
        vocab = {piece: i for i, piece in enumerate(pieces)}
        model = models.BPE(vocab, _merges([piece for _, piece in ranked]), byte_fallback=True)
    else:
        # The library would find these names in a text, too: they get a score below that of their characters, and are
        # cut at characters that are unknown, which are in no piece.
        low = 10 * min(itertools.compress(scores, ordinary))
        scores = [score if own else low for score, own in zip(scores, ordinary, strict=True)]
        model = models.Unigram([*zip(pieces, scores, strict=True)], sp.unk_id(), byte_fallback=True)
        if unknown := {*"".join(NAMES)} - known:
            splits.append(f"[{''.join(sorted(unknown))}]")
    library: Any = tokenizers.Tokenizer(model)
    library.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(s), "isolated") for s in splits])
    library.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    return library


def _is_bpe(model: bytes) -> bool:
    messages: Any = importlib.import_module("sentencepiece.sentencepiece_model_pb2")  # generated at run time
    spec = messages.ModelProto.FromString(model).trainer_spec
    return spec.model_type == spec.BPE


def _merges(ranked: list[str]) -> list[tuple[str, str]]:
    """All pairs of pieces that make a piece, in the order of `ranked`.

    sentencepiece merges any two neighbours that make a piece, the best piece first. Of several pairs that make the same
    piece, only one occurs, because what its characters became before does not depend on their neighbours.
    """
    known = set(ranked)
    cuts = ((piece[:k], piece[k:]) for piece in ranked for k in range(1, len(piece)))
    return [pair for pair in cuts if known.issuperset(pair)]


def _bytes() -> Any:
    vocab = {c: b for b, c in enumerate(BYTE_ALPHABET)} | {BOS: 256}
    library: Any = tokenizers.Tokenizer(models.BPE(vocab, []))
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    library.decoder = decoders.ByteLevel()
    return library


def _chars(tokenizer: CharTokenizer) -> Any:
    """Without a token for unknown characters, the library refuses them, as jaxlm does."""
    vocab = {_name(c): i for i, c in enumerate(tokenizer.alphabet)} | {BOS: tokenizer.bos_id}
    library: Any = tokenizers.Tokenizer(models.WordLevel(vocab, unk_token=UNKNOWN))
    library.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    library.decoder = decoders.Fuse()
    return library


def _name(c: str) -> str:
    """A character's entry in the vocabulary. The library's texts cannot hold a lone surrogate, so it gets a name."""
    return f"<U+{ord(c):04X}>" if "\ud800" <= c <= "\udfff" else c
