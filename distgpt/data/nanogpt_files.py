"""Token arrays in nanoGPT's .bin files: little-endian uint16 token ids without a header.

A folder with train.bin and val.bin gives the arrays `train` and `val`, a single .bin file the array `tokens`.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from distgpt.data.token_array import TokenArray, TokenFormat, open_fd, tail_fingerprint
from distgpt.errors import DataError

_SPLITS = ("train", "val")
_DTYPE = np.dtype("<u2")
_LLM_C_MAGICS = (20240520, 20240801)  # the first int32 of llm.c's token files, of uint16 and of uint32 tokens


def _matches(path: Path, head: bytes) -> bool:
    """A .bin file, or a folder with at least one of train.bin and val.bin."""
    if path.is_dir():
        return any((path / f"{split}.bin").exists() for split in _SPLITS)
    return path.suffix == ".bin"


def _open(path: Path) -> dict[str, TokenArray]:
    """The arrays of a folder or of one file. Raises DataError."""
    if not path.is_dir():
        return {"tokens": _open_bin(path, "tokens")}
    missing = [f"{split}.bin" for split in _SPLITS if not (path / f"{split}.bin").is_file()]
    if missing:
        raise DataError(f"{path}: has no file {missing[0]}, expected train.bin and val.bin; add it")
    return {split: _open_bin(path / f"{split}.bin", split) for split in _SPLITS}


def _open_bin(path: Path, name: str) -> TokenArray:
    """The array in one file. Raises DataError."""
    size = path.stat().st_size
    if not size or size % _DTYPE.itemsize:
        raise DataError(
            f"{path}: got {size:,} bytes, expected uint16 tokens without a header: an even number of bytes, at least "
            "2; download or create it again"
        )
    with path.open("rb") as file:
        magic = int.from_bytes(file.read(4), "little")
        if magic in _LLM_C_MAGICS:
            raise DataError(
                f"{path}: begins with llm.c's header (magic {magic}), which is not supported; "
                "expected uint16 tokens without a header: save its tokens as .npz"
            )
        fingerprint = tail_fingerprint(file, 0, size)
    return TokenArray(path, name, 0, _DTYPE, size // _DTYPE.itemsize, fingerprint, open_fd(path))


NANOGPT = TokenFormat("nanoGPT's .bin (a file, or a folder with train.bin and val.bin)", _matches, _open)
