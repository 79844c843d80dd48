"""Opens files of token ids: .bin of uint16, as nanoGPT writes it, .bin with llm.c's header, and .npy of integers."""

from pathlib import Path

import numpy as np

from jaxlm.config import UserError, show
from jaxlm.data.sources.documents import BLOCK
from jaxlm.data.token_file import TokenFile

HEADER = 256  # int32 at the start of llm.c's .bin: a magic number, a version, the number of tokens, and zeros
MAGIC = {20240520: (1, np.dtype("<u2")), 20240801: (7, np.dtype("<u4"))}  # magic number: (version, dtype of the tokens)
LOOKED_AT = 100_000  # values read from the start of a file without a header, to check their width


def open_array(path: Path, vocab_size: int) -> tuple[Path, TokenFile]:
    """The path and the ids of a .bin or .npy file. Raises UserError if it is not one. `check_ids` checks the ids."""
    try:
        if path.suffix == ".npy":
            mapped = np.lib.format.open_memmap(path, mode="r")  # np.load would open archives and pickles too
            if mapped.ndim != 1 or mapped.dtype.kind not in "iu":
                raise UserError(f"{path}: {mapped.dtype} of shape {mapped.shape}; allowed: one dimension of integers")
            array = TokenFile(path, mapped.dtype, mapped.offset, len(mapped))
        elif path.stat().st_size % 2:
            raise UserError(f"{path}: {path.stat().st_size} bytes; allowed: an even number, in a .bin of uint16")
        else:
            array = _without_header(TokenFile(path, np.dtype("<u2"), 0, path.stat().st_size // 2), vocab_size)
    except UserError:
        raise
    except Exception as error:  # a .npy's header is a Python literal, and NumPy raises whatever Python's parser does
        raise UserError(f"{path}: unreadable ({show(str(error))})") from error
    return path, array


def _without_header(file: TokenFile, vocab_size: int) -> TokenFile:
    """The tokens after llm.c's header or, if there is none, all of the file, which must look like uint16."""
    path, size = file.path, 4 * HEADER
    header = file.read(0, 2 * HEADER).view("<i4") if file.nbytes >= size else np.zeros(3, np.int32)
    if int(header[0]) not in MAGIC:
        _check_width(file, vocab_size)
        return file
    version, dtype = MAGIC[int(header[0])]
    tokens = TokenFile(path, dtype, size, (file.nbytes - size) // dtype.itemsize)
    if header[1] != version or header[2] != len(tokens):
        raise UserError(
            f"{path}: version {header[1]} with {len(tokens)} tokens; allowed with llm.c's header: version "
            f"{version} ({dtype.name}), and the {header[2]} tokens that the header announces"
        )
    return tokens


def _check_width(file: TokenFile, vocab_size: int) -> None:
    """Raises UserError if the uint16s look like 32-bit ids: every second one could be an upper half, not all others."""
    path, head = file.path, file.read(0, LOOKED_AT)
    is_pairs = len(file) % 2 == 0 and len(head) >= 16 and head[1::2].max() <= (vocab_size - 1) >> 16
    if is_pairs and head[::2].max() > (vocab_size - 1) >> 16:
        raise UserError(
            f"{path}: looks like 32-bit ids; allowed: .bin of uint16 without a header, .bin of uint32 with "
            "llm.c's header, or .npy"
        )


def check_ids(file: TokenFile, name: Path, vocab_size: int) -> None:
    """Raises UserError, which names the first bad id, if an id is not in 0 … vocab_size - 1."""
    for start in range(0, len(file), BLOCK):
        block = file.read(start, start + BLOCK)
        bad = np.flatnonzero((block < 0) | (block >= vocab_size))
        if bad.size:
            raise UserError(
                f"{name}: id {block[bad[0]]} at position {start + bad[0]}; "
                f"allowed: 0 to {vocab_size - 1}, the ids of the tokenizer or data.vocab_size"
            )
