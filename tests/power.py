"""A model of power failures: a recorder of file system operations, and a simulated disk to replay them on.

`python -m tests.power FOLDER PHASE ...` (also under torchrun) trains below FOLDER/disk as `PHASES` says, and writes
every operation there to FOLDER/logs. Operations are observed through Python's audit events and `os.fsync`, so that
nothing depends on what distgpt says about itself.
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
"""What is trained, in this order: a run to its end, more steps of it, its last steps again after the newest checkpoint
was damaged, and another run in the same folder."""


@dataclass(frozen=True)
class Op:
    """One operation of a process on the disk."""

    time_ns: int
    """On the monotonic clock, which all processes of a machine share."""
    kind: str
    """create, truncate, mkdir, rename, remove, write, fsync or note."""
    path: str
    """Relative to the disk's root."""
    to: str = ""
    """The new path of a rename; the phase that a note says begins."""
    content: bytes | None = None
    """Of a file that is written or flushed."""
    names: tuple[str, ...] | None = None
    """Entries of a folder that is flushed."""
    dropped: bool = False
    """Marks an fsync that is left out of a replay, to test whether it is needed."""


class Recorder:
    """Records what this process does below `root`, one Op per line."""

    def __init__(self, root: Path, log: Path) -> None:
        self.root = root.resolve()
        self.log_fd = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        self.lock = threading.RLock()
        self.original_fsync = os.fsync
        os.fsync = os.fdatasync = self.fsync  # type: ignore[assignment]
        sys.addaudithook(self.on_event)

    def on_event(self, event: str, args: tuple[Any, ...]) -> None:
        """Record what Python is about to do. If the call then fails, the replay of it does nothing."""
        match event:
            case "open":
                self.on_open(*args)
            case "os.mkdir":
                self.record("mkdir", self.resolve(args[0], args[2]))
            case "os.remove" | "os.rmdir":
                self.record("remove", self.resolve(args[0], args[1]))
            case "os.rename":
                self.on_rename(self.resolve(args[0], args[2]), self.resolve(args[1], args[3]))
            case "os.truncate" | "os.link" | "os.symlink":
                path = args[0] if event == "os.truncate" else args[1]
                assert isinstance(path, int) or self.resolve(path, -1) is None, f"{event} cannot be replayed"

    def on_open(self, path: Any, mode: Any, flags: int) -> None:
        """Record a file that opening creates or truncates. A folder is opened with O_CREAT only for O_TMPFILE."""
        if flags & os.O_CREAT and not isinstance(path, int) and not Path(os.fsdecode(path)).is_dir():
            self.record("truncate" if flags & os.O_TRUNC else "create", self.resolve(path, -1))

    def on_rename(self, path: Path | None, to: Path | None) -> None:
        """Record a rename, and before it the present content: what Rust code writes causes no audit event."""
        assert (path is None) == (to is None), f"{path} is renamed into or out of {self.root}"
        if path is not None and to is not None and path.exists():
            with self.lock:
                self.record_existing(path)
                self.record("rename", path, to=str(to.relative_to(self.root)))

    def record_existing(self, path: Path) -> None:
        """Record a file or folder as it is now."""
        self.record("mkdir" if path.is_dir() else "create", path)
        if path.is_file():
            self.record("write", path, content=path.read_bytes())

    def fsync(self, file: Any) -> None:
        """Call the real `os.fsync`, then record it, with the content from before the call."""
        fd = file if isinstance(file, int) else file.fileno()
        path = self.resolve(fd_path(fd), -1)
        with self.lock:
            if path is not None:
                self.record_existing(path)
            content = path.read_bytes() if path and path.is_file() else None
            names = sorted(entry.name for entry in path.iterdir()) if path and path.is_dir() else None
            self.original_fsync(fd)
            self.record("fsync", path, content=content, names=names)

    def resolve(self, path: Any, dir_fd: int) -> Path | None:
        """The absolute path that a call means, relative to an open folder if one is given; None if it is elsewhere."""
        base = fd_path(dir_fd) if dir_fd >= 0 else Path.cwd()
        joined = Path(base, os.fsdecode(path))
        absolute = Path(os.path.realpath(joined.parent), joined.name)
        return absolute if absolute.is_relative_to(self.root) else None

    def record(self, kind: str, path: Path | None, content: bytes | None = None, **more: Any) -> None:
        """Write one line, in chronological order."""
        if path is None:
            return
        with self.lock:
            encoded = None if content is None else base64.b64encode(content).decode()
            relative = str(path.relative_to(self.root))
            row = {"time_ns": time.monotonic_ns(), "kind": kind, "path": relative, "content": encoded}
            os.write(self.log_fd, (json.dumps(row | more) + "\n").encode())


def fd_path(fd: int) -> Path:
    """The present path of what a descriptor has open."""
    return Path(f"/proc/self/fd/{fd}").readlink()


def read_logs(folder: Path) -> list[Op]:
    """The operations of all processes in chronological order."""
    ops = []
    for log in folder.glob("*.jsonl"):
        for line in log.read_text().splitlines():
            row = json.loads(line)
            content = None if row["content"] is None else base64.b64decode(row["content"])
            names = None if row.get("names") is None else tuple(row["names"])
            ops.append(Op(row["time_ns"], row["kind"], row["path"], row.get("to", ""), content, names))
    return sorted(ops, key=lambda op: op.time_ns)


@dataclass(eq=False)
class File:
    """A file's content in memory and on disk."""

    cached: bytes = b""
    """What a program reads."""
    synced: bytes = b""
    """What was last flushed."""
    guaranteed: bytes = b""
    """`synced`, or nothing if the file was truncated since: no failure leaves less."""


@dataclass(eq=False)
class Folder:
    """A folder's entries in memory and on disk, and the changes between the two."""

    cached: dict[str, File | Folder] = field(default_factory=dict)
    synced: dict[str, File | Folder] = field(default_factory=dict)
    changes: list[dict[str, File | Folder | None]] = field(default_factory=list)
    """Each maps names to their new entries, None for a deleted one; a rename is one change of two names."""

    def change(self, names: dict[str, File | Folder | None]) -> None:
        """Change entries in memory."""
        self.changes.append(names)
        self.cached = apply_change(self.cached, names)


def apply_change(entries: dict[str, File | Folder], names: dict[str, File | Folder | None]) -> dict[str, File | Folder]:
    """Entries after a change."""
    return {name: node for name, node in (entries | names).items() if node is not None}


class Disk:
    """A file system that keeps what was flushed and, of everything else, whatever a failure happens to leave.

    It guarantees what POSIX does and no more: a flushed file may be missing unless its folder was flushed too, and
    changes of two folders, or of a file and its folder, reach the disk in any order.
    """

    def __init__(self, *folders: str) -> None:
        self.root = Folder()
        for name in folders:
            self.root.cached[name] = self.root.synced[name] = Folder()

    def apply(self, op: Op) -> None:
        """Apply an operation. One that must have failed changes nothing."""
        if op.kind == "note":
            return
        parent_path, _, name = op.path.rpartition("/")
        parent, node = self.lookup(parent_path), self.lookup(op.path)
        if not isinstance(parent, Folder):
            return
        match op.kind:
            case "create" | "truncate" if node is None:
                parent.change({name: File()})
            case "truncate" if isinstance(node, File):
                node.cached = node.guaranteed = b""
            case "mkdir" if node is None:
                parent.change({name: Folder()})
            case "remove" if isinstance(node, File) or (node and not node.cached):
                parent.change({name: None})
            case "rename" if node is not None:
                new_parent_path, _, new_name = op.to.rpartition("/")
                assert new_parent_path == parent_path, f"{op}: moves between folders"
                parent.change({name: None, new_name: node})
            case "write" if isinstance(node, File) and op.content is not None:
                node.cached = op.content
            case "fsync":
                self.fsync(node, op)

    def fsync(self, node: File | Folder | None, op: Op) -> None:
        """Keep what was flushed. A folder must be as the replay has it, otherwise an operation was not recorded."""
        if isinstance(node, File) and op.content is not None:
            node.cached = op.content
            if not op.dropped:
                node.synced = node.guaranteed = op.content
        elif isinstance(node, Folder):
            assert op.names == tuple(sorted(node.cached)), f"{op.path}: {op.names}, replayed {sorted(node.cached)}"
            if not op.dropped:
                node.synced, node.changes = node.cached, []

    def lookup(self, path: str) -> File | Folder | None:
        """The file or folder at a path, in memory."""
        node: File | Folder | None = self.root
        for name in path.split("/") if path not in ("", ".") else ():
            node = node.cached.get(name) if isinstance(node, Folder) else None
        return node

    def after_failure(self, outcome: Outcome) -> dict[str, bytes | None]:
        """What a power failure leaves: the content of each file by path, and None for each folder."""

        def walk(folder: Folder, prefix: str) -> Iterator[tuple[str, bytes | None]]:
            for name, node in outcome.entries(folder).items():
                if isinstance(node, File):
                    yield prefix + name, outcome.content(node)
                else:
                    yield prefix + name, None
                    yield from walk(node, f"{prefix}{name}/")

        return dict(walk(self.root, ""))


@dataclass(frozen=True)
class Outcome:
    """What happens to data that was not flushed."""

    name: str
    entries: Callable[[Folder], dict[str, File | Folder]]
    content: Callable[[File], bytes]


ALL_LOST = Outcome("all lost", lambda folder: folder.synced, lambda file: file.synced)
NAMES_ONLY = Outcome("names only", lambda folder: folder.cached, lambda file: file.guaranteed)
CONTENT_ONLY = Outcome("content only", lambda folder: folder.synced, lambda file: file.cached)
ALL_KEPT = Outcome("all kept", lambda folder: folder.cached, lambda file: file.cached)


def random_outcome(seed: int) -> Outcome:
    """The first few changes of each folder survive, and a part of each file, followed by nothing or by zeros."""
    rng = random.Random(seed)

    def entries(folder: Folder) -> dict[str, File | Folder]:
        survivors = folder.synced
        for change in folder.changes[: rng.randint(0, len(folder.changes))]:
            survivors = apply_change(survivors, change)
        return survivors

    def content(file: File) -> bytes:
        if file.cached == file.synced == file.guaranteed:
            return file.cached
        min_length = len(file.guaranteed) if file.cached.startswith(file.guaranteed) else 0
        survivor = file.cached[: rng.randint(min_length, len(file.cached))]
        return rng.choice([survivor, survivor.ljust(len(file.cached), b"\0")])

    return Outcome(f"random, seed {seed}", entries, content)


def damage_newest_checkpoint(output_dir: Path) -> None:
    """Flip one bit of the newest checkpoint's weights, and flush it."""
    newest = max((output_dir / "checkpoints").glob("step-*"))
    with next(newest.glob("*.safetensors")).open("r+b") as file:
        last = file.seek(-1, os.SEEK_END)
        value = file.read(1)[0]
        file.seek(last)
        file.write(bytes([value ^ 1]))
        file.flush()
        os.fsync(file.fileno())


def main() -> None:
    """Record the given phases on this rank."""
    folder, phases = Path(sys.argv[1]), sys.argv[2:]
    disk, logs = folder / "disk", folder / "logs"
    recorder = Recorder(disk, logs / f"{os.getpid()}.jsonl")
    from distgpt import train
    from distgpt.errors import exit_process

    for phase in phases:
        if os.environ.get("RANK", "0") == "0":
            recorder.record("note", disk / "run", to=phase)
            if phase == "damaged":
                damage_newest_checkpoint(disk / "run")
        train.main([str(folder / "power.yaml"), *PHASES[phase]])
    exit_process(0)


if __name__ == "__main__":
    main()
