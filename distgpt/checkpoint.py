"""A checkpoint on disk: begin, seal, publish, find, verify, prune. It is complete under its name, or absent.

A checkpoint is a folder `checkpoints/step-00000250`: safetensors files (`saver` writes and reads those), `state.json`
for what is no tensor, and `manifest.json` with the size and sha256 of every file. Why no interruption can lose one:

1. `begin`: files are written into a folder of another name, of which nobody else knows, and flushed one by one.
2. `seal`: the manifest is written last, from what is on disk, and the folder's entries are flushed.
3. `publish`: one rename gives the folder its name; the rename is flushed, as `checkpoints` itself was before. Until
   then there is the last checkpoint; from then on, the new one; there is no between.
4. `prune`: only then, and only once the new one has been read back whole, older ones are deleted, by rename first.
5. `newest`: what a crash, a full disk or a bad sector has spoilt does not verify, and the one before it is taken.

Nothing here needs torch, runs code from a file, or trusts a file before its hash has been compared.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distgpt import durable
from distgpt.errors import CheckpointError

FORMAT = 1
MANIFEST, STATE = "manifest.json", "state.json"
NAME = re.compile(r"step-(\d{8,})")


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint on disk."""

    path: Path
    step: int
    """Updates made before it was saved."""
    state: dict[str, Any]
    """What is no tensor: the config and everything else that must be the same when the run goes on."""


def begin(output_dir: Path, step: int, attempt: str) -> Path:
    """Make the folder to write a checkpoint's files into.

    `attempt` differs between starts of a run: a process that has outlived its run writes where nobody looks.
    """
    partial = partial_path(output_dir, step, attempt)
    partial.mkdir(parents=True)
    return partial


def partial_path(output_dir: Path, step: int, attempt: str) -> Path:
    """The folder that `begin` makes."""
    return output_dir / "checkpoints" / f".step-{step:08d}.{attempt}.partial"


def seal(partial: Path, files: dict[str, Any], state: dict[str, Any]) -> None:
    """Add state and manifest to a folder whose other files, `describe`d in `files`, are written and flushed."""
    write_json(partial / STATE, state)
    files = files | {STATE: describe(partial / STATE)}
    on_disk_only = {path.name for path in partial.iterdir()} - files.keys()
    assert not on_disk_only, f"{partial}: not in the manifest: {on_disk_only}"
    write_json(partial / MANIFEST, {"format": FORMAT, "files": dict(sorted(files.items()))})
    durable.sync(partial)


def publish(partial: Path, output_dir: Path, step: int) -> Path:
    """Give a sealed folder its name, replacing a checkpoint of that step that the run has passed over."""
    target = output_dir / "checkpoints" / f"step-{step:08d}"
    durable.remove(target)
    durable.sync(output_dir)  # `checkpoints` and metrics.jsonl may be new there
    partial.rename(target)
    durable.sync(target.parent)
    return target


def newest(output_dir: Path) -> tuple[Checkpoint | None, list[str]]:
    """The newest checkpoint that verifies, and a line for each newer one that does not."""
    rejected: list[str] = []
    for step, path in sorted(on_disk(output_dir), reverse=True):
        try:
            return Checkpoint(path, step, verify(path)), rejected
        except CheckpointError as error:
            rejected.append(f"passing over {error}")
    return None, rejected


def at(path: Path) -> Checkpoint | None:
    """The checkpoint whose folder `path` is; None for a path that is not named like one. Raises CheckpointError."""
    match = NAME.fullmatch(path.name)
    return Checkpoint(path, int(match[1]), verify(path)) if match else None


def on_disk(output_dir: Path) -> Iterator[tuple[int, Path]]:
    """Every folder that is named like a checkpoint, with its step."""
    folder = output_dir / "checkpoints"
    for path in folder.iterdir() if folder.is_dir() else ():
        if match := NAME.fullmatch(path.name):
            yield int(match[1]), path


def verify(path: Path) -> dict[str, Any]:
    """Compare every file of a checkpoint with its manifest; return its state. Raises CheckpointError."""
    manifest = read_json(path / MANIFEST)
    if manifest.get("format") != FORMAT:
        raise CheckpointError(
            f"{path}: format {manifest.get('format')}, expected {FORMAT}; use the distgpt that wrote it"
        )
    listed = manifest.get("files")
    if (path / MANIFEST).read_bytes() != to_json(manifest).encode() or not isinstance(listed, dict):
        raise CheckpointError(f"{path / MANIFEST}: damaged; restore or delete {path}")
    found = {file.name for file in path.iterdir()} - {MANIFEST}
    for name in sorted(listed.keys() | found | {STATE}):
        got = describe(path / name) if name in found else None
        if got != listed.get(name) or got is None:
            expected = listed.get(name, "no such file")
            raise CheckpointError(f"{path / name}: damaged (got {got}, expected {expected}); restore or delete {path}")
    return read_json(path / STATE)


def describe(path: Path) -> dict[str, Any]:
    """Size in bytes and sha256 of a file. Raises CheckpointError for what cannot be read or is no plain file."""
    if path.is_symlink() or not path.is_file():
        raise CheckpointError(f"{path}: not a file of a checkpoint; delete it or {path.parent}")
    try:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            return {"bytes": os.fstat(file.fileno()).st_size, "sha256": digest}
    except OSError as error:
        raise CheckpointError(f"{path}: unreadable ({error.strerror}); restore or delete {path.parent}") from None


def prune(output_dir: Path, step: int, keep: int) -> None:
    """Keep the newest `keep` valid checkpoints up to `step` and the one of lowest validation loss; delete the others.

    Later ones are damaged: the run passed over them when it began. Only rank 0 calls. Raises CheckpointError if that of
    `step` is damaged, and deletes nothing then.
    """
    valid: list[Checkpoint] = []
    for saved_at, path in sorted(on_disk(output_dir), reverse=True):
        if saved_at <= step:
            try:
                valid.append(Checkpoint(path, saved_at, verify(path)))
            except CheckpointError:
                if saved_at == step:  # just written, and does not read back: nothing is deleted for it
                    raise
    kept = valid[:keep]
    if scored := [one for one in valid if math.isfinite(one.state.get("val_loss") or math.nan)]:
        kept.append(min(scored, key=lambda one: (one.state["val_loss"], -one.step)))
    if len(valid) >= keep or step < 0:  # while too few are sound, what is damaged may still be of use to somebody
        for _, path in on_disk(output_dir):
            if path not in {one.path for one in kept}:
                durable.remove(path)
    durable.remove_leftovers(output_dir / "checkpoints", ".step-*")


def remove_all(output_dir: Path) -> None:
    """Delete every checkpoint, and nothing else."""
    prune(output_dir, step=-1, keep=0)


def to_json(value: dict[str, Any]) -> str:
    """The one way in which a checkpoint's JSON is written: another text of the same meaning is damaged."""
    return json.dumps(value, indent=2)


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write an object and flush it."""
    path.write_text(to_json(value), encoding="utf-8")
    durable.sync(path)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; raises CheckpointError."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: unreadable ({error}); restore or delete {path.parent}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: got {type(value).__name__}, expected a JSON object; delete {path.parent}")
    return value
