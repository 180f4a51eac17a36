"""Checkpoints on disk: create, commit, find, verify and prune. A checkpoint is complete under its name or absent.

A checkpoint is a folder `checkpoints/step-00000250`. It holds safetensors files (written and read by `saver`),
`state.json` for everything that is not a tensor, and `manifest.json` with the size and sha256 of every other file.
No interruption can lose a checkpoint, because a save takes these steps:

1. `create_staging_dir`: files are written into a folder with a temporary name, and each is flushed.
2. `write_manifest`: the manifest is written last, from what is on disk, and the folder's entries are flushed.
3. `commit`: one rename gives the folder its final name. `checkpoints` was flushed before, and the rename is after it.
4. `prune`: older checkpoints are deleted only now, and only once the new one has been read back and verified.

A checkpoint damaged by a crash, a full disk or a bad sector fails `verify`, and `latest_valid` takes the one before it.
This module needs no torch, never runs code from a file, and uses no content before its hash has been compared.
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

from distgpt import atomic_io
from distgpt.errors import CheckpointError

FORMAT = 2
"""Version that is written. All versions from 1 are read."""

MANIFEST, STATE = "manifest.json", "state.json"

_DIR_NAME = re.compile(r"step-(\d{8,})")


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint on disk."""

    path: Path
    step: int
    """Updates made before it was saved."""
    state: dict[str, Any]
    """{part: {key: value}} of all parts of the training state that are not tensors, in the current format."""

    @property
    def val_loss(self) -> float | None:
        """Validation loss of its weights; None if they were not evaluated."""
        loss: float | None = self.state.get("progress", {}).get("val_loss")
        return loss


def create_staging_dir(output_dir: Path, step: int, launch_id: str) -> Path:
    """Create the folder to write a checkpoint's files into.

    `launch_id` differs between launches of a run, so that a process that outlived its run never writes into the folder
    of a later launch.
    """
    staging_dir = staging_path(output_dir, step, launch_id)
    staging_dir.mkdir(parents=True)
    return staging_dir


def staging_path(output_dir: Path, step: int, launch_id: str) -> Path:
    """The folder that `create_staging_dir` creates."""
    return output_dir / "checkpoints" / f".step-{step:08d}.{launch_id}.partial"


def write_manifest(staging_dir: Path, digests: dict[str, Any], state: dict[str, Any]) -> None:
    """Write state and manifest into a folder whose other files are flushed. `digests` has their `file_digest`s."""
    write_json(staging_dir / STATE, state)
    digests = digests | {STATE: file_digest(staging_dir / STATE)}
    unlisted = {path.name for path in staging_dir.iterdir()} - digests.keys()
    assert not unlisted, f"{staging_dir}: not in the manifest: {unlisted}"
    write_json(staging_dir / MANIFEST, {"format": FORMAT, "files": dict(sorted(digests.items()))})
    atomic_io.fsync(staging_dir)


def commit(staging_dir: Path, output_dir: Path, step: int) -> Path:
    """Rename a folder that has its manifest to its final name, replacing a damaged checkpoint of the same step."""
    path = output_dir / "checkpoints" / f"step-{step:08d}"
    atomic_io.remove_dir(path)
    atomic_io.fsync(output_dir)  # `checkpoints` and metrics.jsonl may be new there
    staging_dir.rename(path)
    atomic_io.fsync(path.parent)
    return path


def latest_valid(output_dir: Path) -> tuple[Checkpoint | None, list[str]]:
    """The newest checkpoint that verifies, and one message for each newer one that does not."""
    skipped: list[str] = []
    for step, path in sorted(list_checkpoints(output_dir), reverse=True):
        try:
            return Checkpoint(path, step, verify(path)), skipped
        except CheckpointError as error:
            skipped.append(f"skipping {error}")
    return None, skipped


def open_checkpoint(path: Path) -> Checkpoint | None:
    """Verify and open the checkpoint in the folder `path`. Raises CheckpointError if it is damaged.

    Returns None for a path that is not named like a checkpoint.
    """
    match = _DIR_NAME.fullmatch(path.name)
    return Checkpoint(path, int(match[1]), verify(path)) if match else None


def list_checkpoints(output_dir: Path) -> Iterator[tuple[int, Path]]:
    """(step, path) of every folder that is named like a checkpoint, in no particular order."""
    folder = output_dir / "checkpoints"
    for path in folder.iterdir() if folder.is_dir() else ():
        if match := _DIR_NAME.fullmatch(path.name):
            yield int(match[1]), path


def verify(path: Path) -> dict[str, Any]:
    """Compare every file of a checkpoint with its manifest. Returns its state, converted to the current format.

    Raises CheckpointError for a damaged, incomplete or newer checkpoint.
    """
    manifest = read_json(path / MANIFEST)
    version = manifest.get("format")
    if version not in range(1, FORMAT + 1):
        raise CheckpointError(
            f"{path}: format {version}, expected {FORMAT} or older; use the version of distgpt that wrote it"
        )
    listed = manifest.get("files")
    if (path / MANIFEST).read_bytes() != to_json(manifest).encode() or not isinstance(listed, dict):
        raise CheckpointError(f"{path / MANIFEST}: damaged; restore or delete {path}")
    present = {file.name for file in path.iterdir()} - {MANIFEST}
    for name in sorted(listed.keys() | present | {STATE}):
        digest = file_digest(path / name) if name in present else None
        if digest != listed.get(name) or digest is None:
            expected = listed.get(name, "no such file")
            raise CheckpointError(
                f"{path / name}: damaged (got {digest}, expected {expected}); restore or delete {path}"
            )
    state = read_json(path / STATE)
    if (version == 1) == all(isinstance(part, dict) for part in state.values()):  # the manifest does not hash itself
        raise CheckpointError(
            f"{path / MANIFEST}: damaged ({STATE} is not of format {version}); restore or delete {path}"
        )
    return _convert_from_format_1(state) if version == 1 else state


def _convert_from_format_1(old: dict[str, Any]) -> dict[str, Any]:
    """The same state in format 2. Format 1 was flat, and its oldest checkpoints lack some keys."""
    renamed = {"ranks": "world_size", "shard_ranks": "shard_size", "reduce_each": "sync_each_micro_step"}
    runtime = dict(old.get("execution", {}))
    if "layout" in runtime:
        runtime["layout"] = {renamed.get(key, key): value for key, value in runtime["layout"].items()}
    progress = {"skipped": old.get("skipped", [0.0, 0.0]), "val_loss": old.get("val_loss")}
    unchanged = {key: value for key, value in old.items() if key not in ("execution", "wandb_run_id", *progress)}
    facts = unchanged | {"runtime": runtime, "run_id": old.get("wandb_run_id")}
    return {"run": facts, "progress": progress}


def file_digest(path: Path) -> dict[str, Any]:
    """Size in bytes and sha256 of a file. Raises CheckpointError if it is unreadable or not a regular file."""
    if path.is_symlink() or not path.is_file():
        raise CheckpointError(f"{path}: not a regular file; delete it or {path.parent}")
    try:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            return {"bytes": os.fstat(file.fileno()).st_size, "sha256": digest}
    except OSError as error:
        raise CheckpointError(f"{path}: unreadable ({error.strerror}); restore or delete {path.parent}") from None


def prune(output_dir: Path, step: int, keep: int) -> None:
    """Keep the newest `keep` valid checkpoints up to `step` and the one of lowest validation loss; delete the others.

    Checkpoints after `step` are damaged: the run skipped them when it started. Only rank 0 calls.
    Raises CheckpointError, and deletes nothing, if the checkpoint of `step` itself is damaged.
    """
    valid: list[Checkpoint] = []
    for saved_step, path in sorted(list_checkpoints(output_dir), reverse=True):
        if saved_step <= step:
            try:
                valid.append(Checkpoint(path, saved_step, verify(path)))
            except CheckpointError:
                if saved_step == step:  # just written, and not readable
                    raise
    keep_paths = {checkpoint.path for checkpoint in valid[:keep]}
    losses = [(loss, -one.step, one.path) for one in valid if (loss := one.val_loss) is not None]
    if finite := [entry for entry in losses if math.isfinite(entry[0])]:
        keep_paths.add(min(finite)[2])
    if len(valid) >= keep or step < 0:  # with too few valid ones, a damaged one may still be recoverable by hand
        for _, path in list_checkpoints(output_dir):
            if path not in keep_paths:
                atomic_io.remove_dir(path)
    atomic_io.remove_leftovers(output_dir / "checkpoints", ".step-*")


def remove_all(output_dir: Path) -> None:
    """Delete every checkpoint, and nothing else."""
    prune(output_dir, step=-1, keep=0)


def to_json(value: dict[str, Any]) -> str:
    """Canonical JSON: `verify` serializes a manifest again and rejects any difference in bytes."""
    return json.dumps(value, indent=2)


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write a JSON object to a file and flush it."""
    path.write_text(to_json(value), encoding="utf-8")
    atomic_io.fsync(path)


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object from a file. Raises CheckpointError."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: unreadable ({error}); restore or delete {path.parent}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: got {type(value).__name__}, expected a JSON object; delete {path.parent}")
    return value
