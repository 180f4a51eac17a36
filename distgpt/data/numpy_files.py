"""Token arrays in numpy's .npz and .npy files.

Arrays in an .npz are read in place where they are stored uncompressed. Compressed ones are unpacked once, into a folder
beside the file.
"""

from __future__ import annotations

import io
import lzma
import os
import shutil
import zipfile
import zlib
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO

import numpy as np

from distgpt.atomic_io import atomic_write
from distgpt.data.token_array import StoredChecksum, TokenArray, TokenFormat, open_fd, tail_fingerprint
from distgpt.errors import DataError, one_line

UNPACKED_SUFFIX = ".unpacked"
"""Added to the name of a compressed .npz: the folder of its unpacked arrays. They are made again if deleted."""

_MAX_HEADER_BYTES = 2**14  # of an .npy file; numpy itself reads headers of at most 10,000 characters
_ZIP_MAGICS = (b"PK\x03\x04", b"PK\x05\x06")  # a local file header, or an archive without members
_NPY_MAGIC = b"\x93NUMPY"


def write_npz(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """Write arrays as an uncompressed .npz, atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as temporary, temporary.open("wb") as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]


def _open_npz(path: Path) -> dict[str, TokenArray]:
    """Every array of a zip archive of .npy files."""
    size = path.stat().st_size
    invalid = (zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError, ValueError, zlib.error, lzma.LZMAError)
    try:
        with zipfile.ZipFile(path) as archive:
            arrays = [_open_member(archive, member, path, size) for member in archive.infolist()]
    except invalid as error:
        raise DataError(f"{path}: damaged .npz ({size:,} bytes: {error}); download or create it again") from None
    return {array.name: array for array in arrays}


def _open_member(archive: zipfile.ZipFile, member: zipfile.ZipInfo, path: Path, size: int) -> TokenArray:
    """The array in one member of an archive, which is `size` bytes long."""
    name = one_line(member.filename.removesuffix(".npy"))
    fingerprint = f"{member.file_size}-{member.CRC:08x}"
    if member.compress_type == zipfile.ZIP_STORED:
        start = _member_start(archive, member)
        if start + member.file_size > size:  # a false size must not lead to reads past the end
            raise zipfile.BadZipFile(f"{member.filename!r} claims {member.file_size:,} bytes")
        array = _open_npy(path, name, start, start + member.file_size, fingerprint)
        return replace(array, checksum=StoredChecksum(start, member.file_size, member.CRC))
    array = _open_npy(_unpack(archive, member, path), name, fingerprint=fingerprint)
    return replace(array, checksum=StoredChecksum(0, member.file_size, member.CRC, remedy="delete it"))


def _member_start(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> int:
    """Byte at which a stored member's content starts: after its local header, whose size only the header gives."""
    assert archive.fp is not None
    archive.fp.seek(member.header_offset)
    header = archive.fp.read(30)
    if len(header) < 30 or header[:4] != b"PK\x03\x04":
        raise zipfile.BadZipFile(f"no local header for {member.filename!r}")
    return member.header_offset + 30 + int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")


def _unpack(archive: zipfile.ZipFile, member: zipfile.ZipInfo, path: Path) -> Path:
    """A compressed member as a file in `PATH.unpacked/`, written atomically the first time."""
    folder = path.with_name(path.name + UNPACKED_SUFFIX)
    target = folder / f"{Path(member.filename).stem}-{member.CRC:08x}.npy"
    if target.exists() and target.stat().st_size == member.file_size:
        return target
    try:
        folder.mkdir(exist_ok=True)
        free_bytes = shutil.disk_usage(folder).free
        if member.file_size > free_bytes:
            raise DataError(
                f"{path}: {one_line(member.filename)} is compressed and needs {member.file_size:,} bytes unpacked, but "
                f"{folder} has {free_bytes:,} free; free disk space, or save it with numpy.savez instead of "
                "savez_compressed"
            )
        with atomic_write(target) as temporary, archive.open(member) as packed, temporary.open("wb") as file:
            shutil.copyfileobj(packed, file, 2**20)
    except OSError as error:
        raise DataError(
            f"{path}: compressed, and cannot be unpacked to {folder}: {error.strerror}; "
            "save it with numpy.savez instead of savez_compressed"
        ) from None
    return target


def _open_npy(
    path: Path, name: str = "tokens", start: int = 0, stop: int | None = None, fingerprint: str | None = None
) -> TokenArray:
    """The integer array whose .npy bytes fill [start, stop) of `path`."""
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        stop = size if stop is None else min(stop, size)
        file.seek(start)
        head = io.BytesIO(file.read(_MAX_HEADER_BYTES))  # numpy would allocate whatever length the header gives
        shape, dtype = _read_npy_header(head, f"{path}: {name}")
        offset = start + head.tell()
        if dtype.hasobject:
            raise DataError(f"{path}: {name} holds Python objects (a pickle), which are never loaded; save integers")
        if dtype.kind not in "iu" or len(shape) != 1:
            raise DataError(
                f"{path}: {name} is an array of {dtype} with shape {shape}, expected one dimension of integers"
            )
        array_stop = offset + shape[0] * dtype.itemsize
        if array_stop > stop:
            raise DataError(
                f"{path}: {name} needs bytes up to {array_stop:,}, but the file ends at {stop:,}; "
                "it was cut short: download or create it again"
            )
        if fingerprint is None:
            fingerprint = tail_fingerprint(file, offset, array_stop)
    return TokenArray(path, name, offset, dtype, shape[0], fingerprint, open_fd(path))


def _read_npy_header(file: BinaryIO, location: str) -> tuple[tuple[int, ...], np.dtype]:
    """Shape and dtype from an .npy header. It is parsed as a literal: no code runs. Raises DataError."""
    try:
        version = np.lib.format.read_magic(file)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = read(file)
        if any(size < 0 for size in shape):
            raise ValueError(f"shape {shape}")
    except Exception as error:  # numpy's parser raises many types on damaged headers: TokenError, OverflowError, ...
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise DataError(f"{location}: invalid .npy header ({reason}); download or create the file again") from None
    return shape, dtype


NPZ = TokenFormat(
    ".npz with arrays train and val",
    lambda path, head: head.startswith(_ZIP_MAGICS),
    _open_npz,
)

NPY = TokenFormat(
    ".npy",
    lambda path, head: head.startswith(_NPY_MAGIC),
    lambda path: {"tokens": _open_npy(path)},
)
