"""Opening token files of every supported format.

To read another format, write a module with a `TokenFormat` (numpy_files.py and nanogpt_files.py are examples) and add
it to `FORMATS`.
"""

from __future__ import annotations

from pathlib import Path

from distgpt.data.nanogpt_files import NANOGPT
from distgpt.data.numpy_files import NPY, NPZ
from distgpt.data.token_array import TokenArray, TokenFormat, smallest_dtype
from distgpt.errors import DataError

__all__ = ["FORMATS", "TokenArray", "TokenFormat", "find_format", "open_token_file", "smallest_dtype"]

FORMATS: tuple[TokenFormat, ...] = (
    NPZ,
    NPY,
    NANOGPT,
)
"""Every format that is read. The first one that matches a file opens it."""

_HEAD_BYTES = 16


def find_format(path: Path) -> TokenFormat | None:
    """The format of a file or folder, or None if none of `FORMATS` matches. Raises OSError.

    A device or pipe matches none; it is not opened, since reading it might never end.
    """
    head = b""
    if path.exists() and not path.is_dir():
        if not path.is_file():
            return None
        with path.open("rb") as file:
            head = file.read(_HEAD_BYTES)
    return next((token_format for token_format in FORMATS if token_format.matches(path, head)), None)


def open_token_file(path: str | Path) -> dict[str, TokenArray]:
    """The token arrays of a file or folder by name (`train`, `val`, ...), with headers checked and no token read.

    A compressed .npz is unpacked once, into a folder beside it. Raises DataError.
    """
    path = Path(path)
    try:
        path.stat()
        token_format = find_format(path)
        if token_format is not None:
            return token_format.open(path)
        if path.is_file():
            description = f"{path.stat().st_size:,} bytes in an unknown format"
        else:
            description = "a folder without train.bin or val.bin" if path.is_dir() else "a device or pipe"
    except OSError as error:
        raise DataError(f"{path}: cannot read: {error.strerror}; give a token file: {_format_names()}") from None
    hint = "; a download cut short looks like this: fetch it again" if path.is_file() else "; give a token file"
    raise DataError(f"{path}: got {description}, expected {_format_names()}{hint}")


def _format_names() -> str:
    """The supported formats, for error messages."""
    *others, last = (token_format.name for token_format in FORMATS)
    return f"{', '.join(others)} or {last}"
