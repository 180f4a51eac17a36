"""What a power failure leaves on disk: a recorder of what a run asks of the file system, and a disk to replay it on.

`python -m tests.power FOLDER PHASE ...` (also under torchrun) trains below FOLDER/disk as `PHASES` says, and writes
every operation there to FOLDER/logs. It hears them from Python's audit events and from `os.fsync`, not from distgpt.
"""

from __future__ import annotations

import base64
import json
import os
import random
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

PHASES: dict[str, tuple[str, ...]] = {
    "first": ("num_training_steps=8",),
    "more": ("num_training_steps=12",),
    "damaged": ("num_training_steps=12",),
    "fresh": ("num_training_steps=4", "seed=1", "--fresh"),
}
"""What is trained, in this order: a run to its end, more of it, its last checkpoint again after that was damaged, and
another run in the same folder."""


@dataclass(frozen=True)
class Op:
    """One operation of a process on the disk."""

    at: int
    """Nanoseconds on the clock that all processes of a machine share."""
    kind: str
    """create, truncate, mkdir, rename, remove, write, fsync or note."""
    path: str
    """Relative to the disk's root."""
    to: str = ""
    """New name of what is renamed; the phase that a note says begins."""
    content: bytes | None = None
    """Of a file that is written or flushed."""
    names: tuple[str, ...] | None = None
    """In a folder that is flushed."""
    dropped: bool = False
    """An fsync that has not been made, to see what it is good for."""


class Recorder:
    """Writes down what this process does below `root`, an Op a line."""

    def __init__(self, root: Path, log: Path) -> None:
        self.root = root.resolve()
        self.log = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        self.lock = threading.RLock()
        self.fsync = os.fsync
        os.fsync = os.fdatasync = self.flush  # type: ignore[assignment]
        sys.addaudithook(self.hear)

    def hear(self, event: str, args: tuple[Any, ...]) -> None:
        """Record what Python is about to do; what turns out to fail is found when it is replayed."""
        match event:
            case "open":
                self.open(*args)
            case "os.mkdir":
                self.record("mkdir", self.place(args[0], args[2]))
            case "os.remove" | "os.rmdir":
                self.record("remove", self.place(args[0], args[1]))
            case "os.rename":
                self.rename(self.place(args[0], args[2]), self.place(args[1], args[3]))
            case "os.truncate" | "os.link" | "os.symlink":
                path = args[0] if event == "os.truncate" else args[1]
                assert isinstance(path, int) or self.place(path, -1) is None, f"{event} cannot be replayed"

    def open(self, path: Any, mode: Any, flags: int) -> None:
        """Record what opening a file does to it."""
        if flags & os.O_CREAT and not isinstance(path, int) and not Path(os.fsdecode(path)).is_dir():  # no TMPFILE
            self.record("truncate" if flags & os.O_TRUNC else "create", self.place(path, -1))

    def rename(self, path: Path | None, to: Path | None) -> None:
        """Record a renaming, and first what there is to rename: Rust, for one, writes files unheard."""
        assert (path is None) == (to is None), f"{path} comes from elsewhere"
        if path is not None and to is not None and path.exists():
            with self.lock:
                self.found(path)
                self.record("rename", path, to=str(to.relative_to(self.root)))

    def found(self, path: Path) -> None:
        """Record what is on disk under a name."""
        self.record("mkdir" if path.is_dir() else "create", path)
        if path.is_file():
            self.record("write", path, content=path.read_bytes())

    def flush(self, file: Any) -> None:
        """`os.fsync`, recorded once it has returned, with what was there when it was called."""
        descriptor = file if isinstance(file, int) else file.fileno()
        path = self.place(opened(descriptor), -1)
        with self.lock:
            if path is not None:
                self.found(path)
            content = path.read_bytes() if path and path.is_file() else None
            names = sorted(entry.name for entry in path.iterdir()) if path and path.is_dir() else None
            self.fsync(descriptor)
            self.record("fsync", path, content=content, names=names)

    def place(self, path: Any, folder: int) -> Path | None:
        """The absolute path that a call means, relative to an open folder if one is given; None for one elsewhere."""
        base = opened(folder) if folder >= 0 else Path.cwd()
        named = Path(base, os.fsdecode(path))
        whole = Path(os.path.realpath(named.parent), named.name)
        return whole if whole.is_relative_to(self.root) else None

    def record(self, kind: str, path: Path | None, content: bytes | None = None, **more: Any) -> None:
        """Write a line, in the order of time."""
        if path is None:
            return
        with self.lock:
            packed = None if content is None else base64.b64encode(content).decode()
            row = {"at": time.monotonic_ns(), "kind": kind, "path": str(path.relative_to(self.root)), "content": packed}
            os.write(self.log, (json.dumps(row | more) + "\n").encode())


def opened(descriptor: int) -> Path:
    """What a descriptor has open, by its present name."""
    return Path(f"/proc/self/fd/{descriptor}").readlink()


def read_logs(folder: Path) -> list[Op]:
    """What all processes did, in the order in which they did it."""
    ops = []
    for log in folder.glob("*.jsonl"):
        for line in log.read_text().splitlines():
            row = json.loads(line)
            content = None if row["content"] is None else base64.b64decode(row["content"])
            names = None if row.get("names") is None else tuple(row["names"])
            ops.append(Op(row["at"], row["kind"], row["path"], row.get("to", ""), content, names))
    return sorted(ops, key=lambda op: op.at)


@dataclass(eq=False)
class File:
    """A file's content in memory, on disk, and the least that may be left of it."""

    cached: bytes = b""
    synced: bytes = b""
    least: bytes = b""
    """`synced`, or nothing where the file has been truncated since."""


@dataclass(eq=False)
class Folder:
    """A folder's entries in memory and on disk, and each change between the two."""

    cached: dict[str, File | Folder] = field(default_factory=dict)
    synced: dict[str, File | Folder] = field(default_factory=dict)
    changes: list[dict[str, File | Folder | None]] = field(default_factory=list)
    """Names with what they newly stand for; a renaming is one change of two names."""

    def change(self, names: dict[str, File | Folder | None]) -> None:
        """Change entries in memory."""
        self.changes.append(names)
        self.cached = changed(self.cached, names)


def changed(entries: dict[str, File | Folder], names: dict[str, File | Folder | None]) -> dict[str, File | Folder]:
    """Entries after a change."""
    return {name: node for name, node in (entries | names).items() if node is not None}


class Disk:
    """A file system that keeps what `fsync` has returned for, and of everything else what a failure happens to leave.

    It is POSIX and no more: a flushed file is not found unless its folder has been flushed too, and two folders, or a
    file and its folder, reach the disk in any order.
    """

    def __init__(self, *folders: str) -> None:
        self.root = Folder()
        for name in folders:
            self.root.cached[name] = self.root.synced[name] = Folder()

    def apply(self, op: Op) -> None:
        """Do what an operation did; like the real one, do nothing where it failed."""
        if op.kind == "note":
            return
        place, _, name = op.path.rpartition("/")
        folder, node = self.find(place), self.find(op.path)
        if not isinstance(folder, Folder):
            return
        match op.kind:
            case "create" | "truncate" if node is None:
                folder.change({name: File()})
            case "truncate" if isinstance(node, File):
                node.cached = node.least = b""
            case "mkdir" if node is None:
                folder.change({name: Folder()})
            case "remove" if isinstance(node, File) or (node and not node.cached):
                folder.change({name: None})
            case "rename" if node is not None:
                new_place, _, new_name = op.to.rpartition("/")
                assert new_place == place, f"{op}: moves between folders"
                folder.change({name: None, new_name: node})
            case "write" if isinstance(node, File) and op.content is not None:
                node.cached = op.content
            case "fsync":
                self.flush(node, op)

    def flush(self, node: File | Folder | None, op: Op) -> None:
        """Keep what an fsync found. A folder must be as it was replayed: else an operation went unheard."""
        if isinstance(node, File) and op.content is not None:
            node.cached = op.content
            if not op.dropped:
                node.synced = node.least = op.content
        elif isinstance(node, Folder):
            assert op.names == tuple(sorted(node.cached)), f"{op.path}: {op.names}, replayed {sorted(node.cached)}"
            if not op.dropped:
                node.synced, node.changes = node.cached, []

    def find(self, path: str) -> File | Folder | None:
        """What a path stands for in memory."""
        node: File | Folder | None = self.root
        for name in path.split("/") if path not in ("", ".") else ():
            node = node.cached.get(name) if isinstance(node, Folder) else None
        return node

    def left(self, luck: Luck) -> dict[str, bytes | None]:
        """What a power failure leaves: files by path with their content, folders with None."""

        def below(folder: Folder, prefix: str) -> Iterator[tuple[str, bytes | None]]:
            for name, node in luck.entries(folder).items():
                if isinstance(node, File):
                    yield prefix + name, luck.content(node)
                else:
                    yield prefix + name, None
                    yield from below(node, f"{prefix}{name}/")

        return dict(below(self.root, ""))


@dataclass(frozen=True)
class Luck:
    """What becomes of that which has not been flushed."""

    name: str
    entries: Callable[[Folder], dict[str, File | Folder]]
    content: Callable[[File], bytes]


GONE = Luck("all gone", lambda folder: folder.synced, lambda file: file.synced)
EMPTIED = Luck("names only", lambda folder: folder.cached, lambda file: file.least)
UNNAMED = Luck("content only", lambda folder: folder.synced, lambda file: file.cached)
KEPT = Luck("all there", lambda folder: folder.cached, lambda file: file.cached)


def some(seed: int) -> Luck:
    """Of each folder's changes the first few survive, of each file a part, followed by nothing or by zeros."""
    dice = random.Random(seed)

    def entries(folder: Folder) -> dict[str, File | Folder]:
        found = folder.synced
        for change in folder.changes[: dice.randint(0, len(folder.changes))]:
            found = changed(found, change)
        return found

    def content(file: File) -> bytes:
        if file.cached == file.synced == file.least:
            return file.cached
        whole, sure = file.cached, len(file.least) if file.cached.startswith(file.least) else 0
        kept = whole[: dice.randint(sure, len(whole))]
        return dice.choice([kept, kept.ljust(len(whole), b"\0")])

    return Luck(f"some, seed {seed}", entries, content)


def damage_newest(output_dir: Path) -> None:
    """Flip a bit of the newest checkpoint's weights, on disk too."""
    newest = max((output_dir / "checkpoints").glob("step-*"))
    with next(newest.glob("*.safetensors")).open("r+b") as file:
        last = file.seek(-1, os.SEEK_END)
        value = file.read(1)[0]
        file.seek(last)
        file.write(bytes([value ^ 1]))
        file.flush()
        os.fsync(file.fileno())


def main() -> None:
    """Record the phases named, on this rank."""
    folder, phases = Path(sys.argv[1]), sys.argv[2:]
    disk, logs = folder / "disk", folder / "logs"
    recorder = Recorder(disk, logs / f"{os.getpid()}.jsonl")
    from distgpt import train
    from distgpt.errors import leave

    for phase in phases:
        if os.environ.get("RANK", "0") == "0":
            recorder.record("note", disk / "run", to=phase)
            if phase == "damaged":
                damage_newest(disk / "run")
        train.main([str(folder / "power.yaml"), *PHASES[phase]])
    leave(0)


if __name__ == "__main__":
    main()
