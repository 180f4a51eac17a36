"""Files and folders that are whole under their name, or absent, whatever interrupts the writing.

What POSIX promises, and nothing more, is used: `rename` replaces a name at once, and what `fsync` has returned for
survives a power failure. So content is written under another name, flushed, and renamed; then the rename is flushed.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Gives another name to write to, then puts it in place: `path` holds the old content or the new, never a part."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        yield partial
        sync(partial)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    sync(path.parent)


def replace(path: Path, raw: bytes) -> None:
    """Give a file new content."""
    with replacing(path) as partial:
        partial.write_bytes(raw)


def make(folder: Path) -> None:
    """Make a folder, and those above it that are missing, and flush the entry of each: with it, all inside would go."""
    if not folder.exists():
        make(folder.parent)
        folder.mkdir(exist_ok=True)
        sync(folder.parent)


def sync(path: Path) -> None:
    """Flush a file's content, or a folder's entries (creations and renames), to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove(folder: Path) -> None:
    """Delete a folder. Its name goes first, so that no half of it is ever taken for the whole."""
    if folder.exists():
        doomed = folder.with_name(f".{folder.name}.deleted")
        shutil.rmtree(doomed, ignore_errors=True)
        folder.rename(doomed)
        sync(folder.parent)
        shutil.rmtree(doomed, ignore_errors=True)


def remove_leftovers(folder: Path, pattern: str) -> None:
    """Delete what interrupted calls have left in a folder that nobody else writes to."""
    for path in folder.glob(pattern):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
