"""Loads or makes the tokenizer that a configuration or a path names."""

import json
from collections.abc import Callable
from pathlib import Path

from jaxlm.config import DataConfig, UserError, show
from jaxlm.config.paths import user_path
from jaxlm.data.tokenizers.base import SPEC, ByteTokenizer, CharTokenizer, Texts, Tokenizer, code_points, to_bytes
from jaxlm.data.tokenizers.hf import FILE as HF_FILE
from jaxlm.data.tokenizers.hf import HfTokenizer
from jaxlm.data.tokenizers.sentencepiece import SentencePieceTokenizer
from jaxlm.data.tokenizers.shipped import read_beside

__all__ = ["Tokenizer", "code_points", "load_tokenizer", "make_tokenizer", "to_bytes"]

MODEL_FILE = "tokenizer.model"  # the sentencepiece model that a pretrained model ships

TOKENIZERS: dict[str, type[Tokenizer]] = {
    "sentencepiece": SentencePieceTokenizer,
    "bytes": ByteTokenizer,
    "chars": CharTokenizer,
    "hf": HfTokenizer,
}


def make_tokenizer(
    data: DataConfig, train_texts: Texts, all_texts: Texts, say: Callable[[str], None] = lambda line: None
) -> Tokenizer:
    """The tokenizer that `data.tokenizer` names, loaded or trained.

    Args:
      train_texts, all_texts: the corpus without and with its validation documents.
      say: shows a line to people.

    Raises:
      UserError: the tokenizer cannot be loaded, or none can be made from the corpus.
    """
    if data.tokenizer_path:
        hf, path = data.tokenizer == "hf", Path(data.tokenizer_path).expanduser()
        # hf reads no other file as a sentencepiece model.
        other_file = hf and path.is_file() and path.suffix not in (".json", ".model")
        tokenizer = None if other_file else load_tokenizer(data.tokenizer_path, prefer_model=not hf)
        shipped = isinstance(tokenizer, SentencePieceTokenizer) and not tokenizer.lossless
        if tokenizer is None or (not shipped and isinstance(tokenizer, HfTokenizer) != hf):
            found = "not a Hugging Face tokenizer" if hf else "a Hugging Face tokenizer"
            allowed = (
                "a tokenizer.json, a tokenizer.model or a folder with one"
                if hf
                else "other tokenizers; data.tokenizer=hf reads it"
            )
            raise UserError(
                f"data.tokenizer_path is {data.tokenizer_path!r}, which is {found}; "
                f"allowed with data.tokenizer={data.tokenizer}: {allowed}"
            )
        return tokenizer
    return TOKENIZERS[data.tokenizer].make(data, train_texts, all_texts, say)


def load_tokenizer(path: str | Path, prefer_model: bool = False) -> Tokenizer:
    """Loads a tokenizer from a folder that `save` wrote, a Hugging Face tokenizer.json or tokenizer.model or their
    folder, or a sentencepiece model.

    Args:
      prefer_model: whether to read a folder's tokenizer.model if it has a tokenizer.json too.

    Raises:
      UserError: there is no tokenizer at `path`, or it is unusable.
    """
    path = user_path("data.tokenizer_path", str(path))
    allowed = "a tokenizer folder, a Hugging Face tokenizer.json or a sentencepiece .model file"
    if not (path.is_file() or path.is_dir()):  # reading a pipe would never end
        found = "not a file" if path.exists() else "no such file"
        raise UserError(f"{path}: {found}; allowed: {allowed}")
    if path.name in (*OWN, "sentencepiece.model") and _own_spec(path.parent):
        path = path.parent
    try:
        tokenizer = _load_file(path) if path.is_file() else _load_folder(path, prefer_model)
        if path.is_dir() or path.name in (HF_FILE, MODEL_FILE):
            tokenizer.beside = read_beside(path if path.is_dir() else path.parent)
        return tokenizer
    except FileNotFoundError as error:
        raise UserError(f"{error.filename}: no such file; allowed: {allowed}") from None
    except OSError as error:
        raise UserError(f"{path}: unreadable ({error.strerror})") from error


def _load_file(path: Path) -> Tokenizer:
    if path.suffix == ".json":
        return HfTokenizer(path.read_bytes(), str(path))
    return SentencePieceTokenizer(path.read_bytes(), lossless=False, name=str(path))


def _load_folder(folder: Path, prefer_model: bool) -> Tokenizer:
    file = _own_spec(folder)
    if file is None:
        model = (folder / MODEL_FILE).is_file() and (prefer_model or not (folder / HF_FILE).is_file())
        return _load_file(folder / (MODEL_FILE if model else HF_FILE))
    try:
        spec = json.loads(file.read_text("utf-8"))
        kind = spec["kind"]
        if kind in TOKENIZERS:
            return TOKENIZERS[kind].load(folder, spec)
    except (UserError, OSError):
        raise
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{file}: unreadable ({error}); allowed: a description that jaxlm wrote") from error
    raise UserError(f"{file}: kind is {show(kind)}; allowed: {', '.join(sorted(TOKENIZERS))}")


# Names of the description in a saved folder. Old ones are called tokenizer.json, as Hugging Face's file is.
OWN = (SPEC, HF_FILE)


def _own_spec(folder: Path) -> Path | None:
    """The description that `save` wrote to a folder; None if the folder holds none."""
    if (folder / SPEC).is_file():
        return folder / SPEC
    try:
        spec = json.loads((folder / HF_FILE).read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    return folder / HF_FILE if isinstance(spec, dict) and "kind" in spec else None
