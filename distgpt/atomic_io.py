"""Files and folders that exist completely under their name or not at all, whatever interrupts the writing.

Only what POSIX guarantees is used: `rename` replaces a name atomically, and data for which `fsync` has returned
survives a power failure. Content is therefore written under a temporary name, flushed and renamed, and then the rename
itself is flushed.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yield a temporary path to write to, then rename it to `path`, which always holds the old or the new content.

    Where the block raises, `path` is unchanged and the temporary file is deleted.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        yield temporary
        fsync(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    fsync(path.parent)


def write_bytes(path: Path, raw: bytes) -> None:
    """Replace a file's content atomically."""
    with atomic_write(path) as temporary:
        temporary.write_bytes(raw)


def make_dirs(path: Path) -> None:
    """Create a folder and its missing parents, and flush the parent of each new one.

    Without that flush, a power failure could remove the folder together with everything in it.
    """
    if not path.exists():
        make_dirs(path.parent)
        path.mkdir(exist_ok=True)
        fsync(path.parent)


def fsync(path: Path) -> None:
    """Flush a file's content, or a folder's entries (creations and renames), to disk."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def remove_dir(path: Path) -> None:
    """Delete a folder, which may be absent. It is renamed first, so that a half-deleted folder never has its name."""
    if path.exists():
        doomed = path.with_name(f".{path.name}.deleted")
        shutil.rmtree(doomed, ignore_errors=True)
        path.rename(doomed)
        fsync(path.parent)
        shutil.rmtree(doomed, ignore_errors=True)


def remove_leftovers(folder: Path, pattern: str) -> None:
    """Delete what interrupted calls left in a folder. No other process may be writing there."""
    for path in folder.glob(pattern):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
