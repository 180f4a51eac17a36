"""Token arrays on disk: reading any range of one, and checking its ids and checksum.

An array is never loaded whole. Each read is one `os.pread` of a range: the ranks of a machine share the kernel's page
cache, nothing stays resident, and a truncated file is reported as an error where a memory map would kill the process.
"""

from __future__ import annotations

import os
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from distgpt.errors import DataError

RETRY_SECONDS = (0.1, 1.0, 3.0)
"""Pauses before a failed read is tried again."""

SCAN_TOKENS = 2**20
"""Tokens read at a time when a whole array is checked."""

_FINGERPRINT_BYTES = 2**20


class StoredChecksum(NamedTuple):
    """A CRC-32 that the file itself stores for a range of its bytes."""

    start: int
    """First byte of the range."""
    num_bytes: int
    crc32: int
    remedy: str = "download or create it again"
    """What to do if the bytes do not match."""


@dataclass(frozen=True)
class TokenArray:
    """A one-dimensional integer array inside a file, read range by range."""

    path: Path
    name: str
    """`train`, `val`, or whatever the array is called in its file."""
    offset: int
    """Byte at which the first token starts."""
    dtype: np.dtype
    length: int
    """Number of tokens."""
    fingerprint: str
    """Differs between files of different tokens. It is made from headers or the end of the file: it does not detect
    every flipped byte."""
    fd: int
    """Open file descriptor."""
    checksum: StoredChecksum | None = None
    """The file's own checksum of the array; None where the format has none."""

    def __len__(self) -> int:
        return self.length

    def read(self, start: int, stop: int, n_vocab: int) -> np.ndarray:
        """Tokens [start, stop) as int64. Raises DataError where the file ends early or an id is not below `n_vocab`."""
        itemsize = self.dtype.itemsize
        raw = self._read_bytes(self.offset + start * itemsize, (stop - start) * itemsize)
        tokens = np.frombuffer(raw, dtype=self.dtype).astype(np.int64)
        if tokens.size and (tokens.max() >= n_vocab or tokens.min() < 0):
            index = int(np.argmax((tokens >= n_vocab) | (tokens < 0)))
            raise DataError(
                f"{self.path}: {self.name}[{start + index}] is token {tokens[index]}, expected 0 to {n_vocab - 1} "
                "(the tokenizer's vocabulary); check tokenizer_encoding or create the tokens again"
            )
        return tokens

    def check_ids(self, n_vocab: int, limit: int | None = None) -> None:
        """Read all tokens and raise what `read` raises. Beyond `limit` tokens, read about that many, evenly spread."""
        starts = range(0, self.length, SCAN_TOKENS)
        if limit is not None and self.length > limit:
            starts = starts[:: -(-self.length // limit)]
        for start in starts:
            self.read(start, min(start + SCAN_TOKENS, self.length), n_vocab)

    def check_crc(self) -> None:
        """Compare all bytes with the checksum that the file stores, if it stores one. Raises DataError."""
        if self.checksum is None:
            return
        start, stop = self.checksum.start, self.checksum.start + self.checksum.num_bytes
        crc32 = 0
        for position in range(start, stop, SCAN_TOKENS):
            crc32 = zlib.crc32(self._read_bytes(position, min(SCAN_TOKENS, stop - position)), crc32)
        if crc32 != self.checksum.crc32:
            raise DataError(
                f"{self.path}: {self.name} has checksum {crc32:08x}, expected {self.checksum.crc32:08x}, which the "
                f"file stores; it is damaged: {self.checksum.remedy}"
            )

    def _read_bytes(self, position: int, num_bytes: int) -> bytes:
        """Exactly `num_bytes` of the file. Raises DataError where it ends early or cannot be read."""
        pieces, missing = [], num_bytes
        while missing:
            piece = self._pread_with_retry(missing, position + num_bytes - missing)
            if not piece:
                raise DataError(
                    f"{self.path}: ends at byte {os.fstat(self.fd).st_size}, expected {position + num_bytes} or "
                    f"more (for {self.name}); the file was truncated or replaced: restore it"
                )
            pieces.append(piece)
            missing -= len(piece)
        return b"".join(pieces)

    def _pread_with_retry(self, num_bytes: int, position: int) -> bytes:
        """Up to `num_bytes`. A read that fails, as on a network file system, is retried. Raises DataError."""
        for pause_seconds in (*RETRY_SECONDS, None):
            try:
                return os.pread(self.fd, num_bytes, position)
            except OSError as error:
                if pause_seconds is None:
                    raise DataError(
                        f"{self.path}: cannot read at byte {position}: {error.strerror}, {len(RETRY_SECONDS) + 1} "
                        "times; fix the disk or network, then run the same command again"
                    ) from None
                time.sleep(pause_seconds)
        raise AssertionError


@dataclass(frozen=True)
class TokenFormat:
    """A kind of token file. `token_files.FORMATS` lists those that are read."""

    name: str
    """For error messages, such as `.npz with arrays train and val`."""
    matches: Callable[[Path, bytes], bool]
    """(path, first bytes) -> whether the path has this format. It may be a folder, whose first bytes are empty."""
    open: Callable[[Path], dict[str, TokenArray]]
    """path -> its arrays by name, with headers checked and no token read. Raises DataError or OSError."""


def tail_fingerprint(file: BinaryIO, start: int, stop: int) -> str:
    """Fingerprint of a file without a checksum: its size and the CRC-32 of the last MiB of [start, stop)."""
    file.seek(max(start, stop - _FINGERPRINT_BYTES))
    return f"{os.fstat(file.fileno()).st_size}-{zlib.crc32(file.read(_FINGERPRINT_BYTES)):08x}"


def open_fd(path: Path) -> int:
    """A descriptor for `TokenArray.fd`, which child processes do not inherit."""
    return os.open(path, os.O_RDONLY | os.O_CLOEXEC)


def smallest_dtype(n_vocab: int) -> np.dtype:
    """The smallest of uint16 and uint32 that holds every id below `n_vocab`."""
    return np.dtype(np.uint16 if n_vocab <= 2**16 else np.uint32)
