"""Tokens on disk: which files hold them, whether they are sound, and reading any stretch of them.

Nothing is ever loaded whole: each read is one `os.pread` of a window, which shares the kernel's page cache between
ranks, keeps nothing resident, and reports a file cut short as an error where a memory map would kill the process.
"""

from __future__ import annotations

import io
import lzma
import os
import shutil
import time
import zipfile
import zlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

import numpy as np

from distgpt import durable
from distgpt.errors import DataError, one_line

RETRY_SECONDS = (0.1, 1.0, 3.0)
"""Pauses before reading again what could not be read."""

SCAN_TOKENS = 2**20
"""Tokens looked at in one piece when a whole array is checked."""


MOST_HEADER_BYTES = 2**14
"""Of an .npy file; numpy itself reads headers of at most 10,000 characters."""

UNPACKED = ".unpacked"
"""Added to the name of a compressed .npz for the folder of its unpacked arrays, which are made again if deleted."""


@dataclass(frozen=True)
class TokenArray:
    """A one-dimensional integer array inside a file, read by stretches."""

    path: Path
    name: str
    """`train`, `val`, or whatever the array is called in its file."""
    offset: int
    """Byte at which the first token starts."""
    dtype: np.dtype
    length: int
    """Tokens."""
    fingerprint: str
    """Differs between files of different tokens. It comes from headers, so it does not find a flipped byte."""
    descriptor: int
    stored: tuple[int, int, int] | None = None
    """First byte, bytes and CRC-32 of the zip member that holds the array, or held it; None for a plain .npy."""

    def __len__(self) -> int:
        return self.length

    def read(self, start: int, stop: int, n_vocab: int) -> np.ndarray:
        """Tokens [start, stop) as int64. Raises DataError where the file ends early or an id is not below `n_vocab`."""
        itemsize = self.dtype.itemsize
        raw = self.read_bytes(self.offset + start * itemsize, (stop - start) * itemsize)
        tokens = np.frombuffer(raw, dtype=self.dtype).astype(np.int64)
        if tokens.size and (tokens.max() >= n_vocab or tokens.min() < 0):
            index = int(np.argmax((tokens >= n_vocab) | (tokens < 0)))
            raise DataError(
                f"{self.path}: {self.name}[{start + index}] is token {tokens[index]}, expected 0 to {n_vocab - 1} "
                "(the tokenizer's vocabulary); check tokenizer_encoding or make the tokens again"
            )
        return tokens

    def read_bytes(self, position: int, size: int) -> bytes:
        """So many bytes of the file. Raises DataError where it ends early or cannot be read."""
        pieces, missing = [], size
        while missing:
            piece = read_patiently(self, missing, position + size - missing)
            if not piece:
                raise DataError(
                    f"{self.path}: ends at byte {os.fstat(self.descriptor).st_size}, expected {position + size} or "
                    f"more (for {self.name}); the file was cut short or replaced: restore it"
                )
            pieces.append(piece)
            missing -= len(piece)
        return b"".join(pieces)

    def check(self, n_vocab: int, limit: int | None = None) -> None:
        """Read everything (past `limit` tokens: about that many, evenly spread) and raise what `read` raises."""
        starts = range(0, self.length, SCAN_TOKENS)
        if limit is not None and self.length > limit:
            starts = starts[:: -(-self.length // limit)]
        for start in starts:
            self.read(start, min(start + SCAN_TOKENS, self.length), n_vocab)

    def verify(self) -> None:
        """Compare all bytes with the checksum in the file, where it has one. Raises DataError."""
        if self.stored is None:
            return
        start, size, expected = self.stored
        found = 0
        for position in range(start, start + size, SCAN_TOKENS):
            found = zlib.crc32(self.read_bytes(position, min(SCAN_TOKENS, start + size - position)), found)
        if found != expected:
            remedy = "delete it" if self.path.parent.suffix == UNPACKED else "fetch or make it again"
            raise DataError(
                f"{self.path}: {self.name} has checksum {found:08x}, expected {expected:08x} as the file says; "
                f"it is damaged: {remedy}"
            )


def read_patiently(array: TokenArray, size: int, position: int) -> bytes:
    """Up to `size` bytes; what a network file system answers wrongly once is asked for again. Raises DataError."""
    for pause in (*RETRY_SECONDS, None):
        try:
            return os.pread(array.descriptor, size, position)
        except OSError as error:
            if pause is None:
                raise DataError(
                    f"{array.path}: cannot read at byte {position}: {error.strerror}, {len(RETRY_SECONDS) + 1} times; "
                    "mend the disk or network and run the same command again"
                ) from None
            time.sleep(pause)
    raise AssertionError


def open_tokens(path: str | Path) -> dict[str, TokenArray]:
    """The token arrays of an .npz file (`train`, `val`, ...) or an .npy file (called `tokens`), checked but not read.

    A compressed .npz is unpacked once, beside itself. Raises DataError.
    """
    path = Path(path)
    try:
        if path.exists() and not path.is_file():
            raise DataError(f"{path}: got a folder or device, expected an .npz file of tokens; name one")
        with path.open("rb") as file:
            magic = file.read(6)
            if magic.startswith(b"PK"):
                return open_npz(path)
            if magic == b"\x93NUMPY":
                return {"tokens": open_npy(path)}
            size = path.stat().st_size
    except OSError as error:
        raise DataError(f"{path}: cannot read: {error.strerror}; give an .npz file with arrays train and val") from None
    raise DataError(
        f"{path}: got {size:,} bytes that are neither .npz nor .npy, expected numpy.savez's train and val arrays; "
        "a download cut short looks like this: fetch it again"
    )


def open_npz(path: Path) -> dict[str, TokenArray]:
    """Every array of a zip of .npy files; stored members are read in place, compressed ones from an unpacked copy."""
    arrays: dict[str, TokenArray] = {}
    size = path.stat().st_size
    try:
        with zipfile.ZipFile(path) as archive:
            for member in archive.infolist():
                name = one_line(member.filename.removesuffix(".npy"))
                fingerprint = f"{member.file_size}-{member.CRC:08x}"
                if member.compress_type == zipfile.ZIP_STORED:
                    start = member_start(archive, member)
                    if start + member.file_size > size:  # nothing is to be read for ever
                        raise zipfile.BadZipFile(f"{member.filename!r} is said to have {member.file_size:,} bytes")
                    array = open_npy(path, name, start, start + member.file_size, fingerprint)
                    arrays[name] = replace(array, stored=(start, member.file_size, member.CRC))
                else:
                    array = open_npy(unpack(archive, member, path), name, fingerprint=fingerprint)
                    arrays[name] = replace(array, stored=(0, member.file_size, member.CRC))  # as it was when packed
    except (
        zipfile.BadZipFile,
        NotImplementedError,
        RuntimeError,
        EOFError,
        ValueError,
        zlib.error,
        lzma.LZMAError,
    ) as error:
        raise DataError(f"{path}: damaged .npz ({size:,} bytes: {error}); fetch or make it again") from None
    return arrays


def member_start(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> int:
    """Byte at which a stored member's content starts: after its local header, which the directory does not describe."""
    assert archive.fp is not None
    archive.fp.seek(member.header_offset)
    header = archive.fp.read(30)
    if len(header) < 30 or header[:4] != b"PK\x03\x04":
        raise zipfile.BadZipFile(f"no local header for {member.filename!r}")
    return member.header_offset + 30 + int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")


def unpack(archive: zipfile.ZipFile, member: zipfile.ZipInfo, path: Path) -> Path:
    """A compressed member as a file of its own in `PATH.unpacked/`, made once; complete or absent."""
    folder = path.with_name(path.name + UNPACKED)
    target = folder / f"{Path(member.filename).stem}-{member.CRC:08x}.npy"
    if target.exists() and target.stat().st_size == member.file_size:
        return target
    try:
        folder.mkdir(exist_ok=True)
        free = shutil.disk_usage(folder).free
        if member.file_size > free:
            raise DataError(
                f"{path}: {one_line(member.filename)} is compressed and needs {member.file_size:,} bytes unpacked, but "
                f"{folder} has {free:,} free; make room, or save it with numpy.savez instead of savez_compressed"
            )
        with durable.replacing(target) as partial, archive.open(member) as packed, partial.open("wb") as file:
            shutil.copyfileobj(packed, file, 2**20)
    except OSError as error:
        raise DataError(
            f"{path}: compressed, and cannot be unpacked to {folder}: {error.strerror}; "
            "save it with numpy.savez instead of savez_compressed"
        ) from None
    return target


def open_npy(
    path: Path, name: str = "tokens", start: int = 0, stop: int | None = None, fingerprint: str | None = None
) -> TokenArray:
    """The integer array whose .npy bytes fill [start, stop) of `path`."""
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        stop = size if stop is None else stop
        file.seek(start)
        head = io.BytesIO(file.read(MOST_HEADER_BYTES))  # numpy would take memory for whatever length it finds in it
        shape, dtype = read_npy_header(head, f"{path}: {name}")
        offset = start + head.tell()
        if dtype.hasobject:
            raise DataError(f"{path}: {name} holds Python objects (a pickle), which are never loaded; save integers")
        if dtype.kind not in "iu" or len(shape) != 1:
            raise DataError(
                f"{path}: {name} is an array of {dtype} with shape {shape}, expected one dimension of integers"
            )
        needed = offset + shape[0] * dtype.itemsize
        if needed > min(stop, size):
            raise DataError(
                f"{path}: {name} needs bytes up to {needed:,}, but the file ends at {min(stop, size):,}; "
                "it was cut short: fetch or make it again"
            )
        if fingerprint is None:
            file.seek(max(offset, needed - 2**20))
            fingerprint = f"{size}-{zlib.crc32(file.read(2**20)):08x}"
    return TokenArray(path, name, offset, dtype, shape[0], fingerprint, os.open(path, os.O_RDONLY | os.O_CLOEXEC))


def read_npy_header(file: BinaryIO, place: str) -> tuple[tuple[int, ...], np.dtype]:
    """Shape and dtype from an .npy header; raises DataError. The header is parsed as a literal: no code runs."""
    try:
        version = np.lib.format.read_magic(file)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = read(file)
        if any(size < 0 for size in shape):
            raise ValueError(f"shape {shape}")
    except Exception as error:  # numpy's parser raises what the damage leads it to: TokenError, OverflowError, ...
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise DataError(f"{place}: no sound .npy header ({reason}); fetch or make the file again") from None
    return shape, dtype


def write_npz(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """Write arrays as an uncompressed .npz: complete under its name, or absent."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with durable.replacing(path) as partial, partial.open("wb") as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]


def smallest_dtype(n_vocab: int) -> np.dtype:
    """The narrowest unsigned type that holds every id below `n_vocab`."""
    return np.dtype(np.uint16 if n_vocab <= 2**16 else np.uint32)
