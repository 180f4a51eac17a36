"""Saves a training state as checkpoints in a background thread, and restores it.

The safetensors files are those of torch.distributed.checkpoint: each rank writes its shards, and any number of ranks
can read them. `store` turns a folder of such files into a checkpoint that no interruption can lose.
"""

from __future__ import annotations

import secrets
import threading
import time
import warnings
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict_loader import load as load_tensors
from torch.distributed.checkpoint.state_dict_saver import save as save_tensors
from torch.distributed.checkpoint.stateful import Stateful

from distgpt import atomic_io
from distgpt.checkpoint import store
from distgpt.checkpoint.store import Checkpoint
from distgpt.distributed.context import DistributedContext
from distgpt.errors import CheckpointError, RuntimeEnvironmentError, UserError, explain_error, short_reason

FILE_BYTES = 2**28
"""Bytes of tensors in one file of a checkpoint, before they are divided among the ranks."""

MAX_FAILURES = 3
"""Consecutive saves that may fail (because of a full disk, for example) before the run ends."""

warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # with one process that is intended


@dataclass(frozen=True)
class Snapshot:
    """A copy of a training state on the CPU, ready to be written."""

    step: int
    tensors: dict[str, Tensor]
    """On the CPU, by "part.key"; under FSDP this rank's shards, as DTensors."""
    state: dict[str, Any]
    """The content of state.json."""
    fsync_first: Path | None = None
    """A file that must be on disk before the checkpoint is."""


class Saver:
    """Saves a run in a background thread: training waits only while its tensors are copied. Every rank has one.

    Only one save is in flight at a time, and the next one waits for it. A save that fails leaves earlier checkpoints
    intact, and training continues. The run ends when MAX_FAILURES consecutive saves, or its last one, have failed.
    """

    def __init__(self, output_dir: Path, keep: int, first_step: int, context: DistributedContext) -> None:
        self.step = first_step
        """Step of the latest checkpoint, saved or in flight."""
        self._output_dir, self._keep = output_dir, keep
        self._context = context.with_new_group()  # collectives of the two threads must not be mixed up
        self._launch_id = context.broadcast_object(secrets.token_hex(4))
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._num_failures = 0
        self._warnings: list[str] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        """Wait for a save in flight, unless `error` means that another rank it needs may be lost.

        Raises what the save failed with, unless there is an error already.
        """
        all_ranks_exit = getattr(error, "on_all_ranks", error is None)
        if self._thread is not None and (all_ranks_exit or self._context.world_size == 1):
            self._thread.join()
        if all_ranks_exit and not isinstance(error, UserError):
            self.wait(last=True)

    def save(self, step: int, state: Stateful, fsync_first: Path | None = None) -> float:
        """Copy a training state and write it as the checkpoint of `step` in the background. All ranks must call.

        `state.state_dict()` is {part: {key: value}}. `fsync_first` is a file that must be on disk before the checkpoint
        is. Returns the seconds that training waited. Raises the error of the previous save if that ends the run.
        """
        started_at = time.monotonic()
        self.wait()
        tensors, json_state = split_state(state.state_dict())
        copies = {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}
        snapshot = Snapshot(step, copies, json_state, fsync_first)
        self.step = step
        self._thread = threading.Thread(target=self._write, args=(snapshot,), name="saver", daemon=True)
        self._thread.start()
        return time.monotonic() - started_at

    def _write(self, snapshot: Snapshot) -> None:
        """Write a checkpoint. An error is kept for `wait` and, as a warning, for `drain_warnings`."""
        if self._context.device.type == "cuda":
            torch.cuda.set_device(self._context.device)  # the current device is per thread
        try:
            write_checkpoint(snapshot, self._output_dir, self._launch_id, self._keep, self._context)
            self._num_failures = 0
        except RuntimeEnvironmentError as error:  # on all ranks
            self._num_failures += 1
            self._error = error
            self._warnings.append(f"warning: {error}")
        except BaseException as error:  # a lost rank or a bug
            self._error = error

    def drain_warnings(self) -> list[str]:
        """The warnings about failed saves since the last call."""
        return [self._warnings.pop(0) for _ in range(len(self._warnings))]

    def wait(self, last: bool = False) -> None:
        """Wait for the save in flight. All ranks must call, and all raise the same error if its failure ends the run.

        With `last`, a single failure does.
        """
        if self._thread is not None:
            self._thread.join()
        self._thread, error, self._error = None, self._error, None
        if error is None:
            return
        if not isinstance(error, RuntimeEnvironmentError):
            raise error
        if last or self._num_failures >= MAX_FAILURES:
            count = "" if self._num_failures < 2 else f" ({self._num_failures} saves in a row have failed)"
            raise RuntimeEnvironmentError(f"{error}{count}", on_all_ranks=True)


def split_state(state_dict: dict[str, dict[str, Any]]) -> tuple[dict[str, Tensor], dict[str, dict[str, Any]]]:
    """Split {part: {key: value}} into tensors by "part.key", for safetensors files, and the rest, for state.json."""
    tensors: dict[str, Tensor] = {}
    json_state: dict[str, dict[str, Any]] = {}
    for part, values in state_dict.items():
        for key, value in values.items():
            if isinstance(value, Tensor):
                tensors[f"{part}.{key}"] = value
            else:
                json_state.setdefault(part, {})[key] = value
    return tensors, json_state


def write_checkpoint(
    snapshot: Snapshot, output_dir: Path, launch_id: str, keep: int, context: DistributedContext
) -> None:
    """Write a checkpoint, then delete those that are no longer kept. All ranks must call, and each writes its shards.

    Raises RuntimeEnvironmentError on every rank where any rank cannot write, or cannot read back what it wrote. Earlier
    checkpoints are intact then.
    """
    try:
        _write_and_commit(snapshot, output_dir, launch_id, keep, context)
    except (CheckpointException, CheckpointError, RuntimeEnvironmentError) as error:
        reason = _failure_reason(error)
        if context.is_rank0:
            atomic_io.remove_leftovers(output_dir / "checkpoints", ".step-*")
        raise RuntimeEnvironmentError(
            f"checkpoint of step {snapshot.step} not saved ({reason}); earlier ones are intact; "
            f"free disk space or fix what failed: {output_dir}",
            on_all_ranks=True,
        ) from None


def _write_and_commit(
    snapshot: Snapshot, output_dir: Path, launch_id: str, keep: int, context: DistributedContext
) -> None:
    """Write the snapshot's tensors and state to a staging folder and make it a checkpoint. All ranks must call."""
    step, tensors = snapshot.step, snapshot.tensors
    staging_dir = store.staging_path(output_dir, step, launch_id)
    context.run_on_all_ranks(lambda: context.is_rank0 and store.create_staging_dir(output_dir, step, launch_id))
    writer = HuggingFaceStorageWriter(str(staging_dir), assign_files(tensors), save_distributed=True)  # flushes each
    save_tensors(tensors, storage_writer=writer, process_group=context.group, no_dist=context.world_size == 1)
    own_files = f"shard-{context.rank + 1:05d}-*"
    own_digests = context.run_on_all_ranks(
        lambda: {path.name: store.file_digest(path) for path in staging_dir.glob(own_files)}
    )
    digests = {name: digest for part in context.all_gather_object(own_digests) for name, digest in part.items()}

    def commit() -> None:
        if not context.is_rank0:
            return
        if snapshot.fsync_first is not None:
            atomic_io.fsync(snapshot.fsync_first)
        store.write_manifest(staging_dir, digests, snapshot.state)
        store.commit(staging_dir, output_dir, step)
        with suppress(OSError):  # the new checkpoint is safe, and the next save deletes what this one could not
            store.prune(output_dir, step, keep)

    context.run_on_all_ranks(commit)


def _failure_reason(error: CheckpointException | CheckpointError | RuntimeEnvironmentError) -> str:
    """Why a save failed; causes on other ranks start with "rank N: ". Raises the original error if it is a bug."""
    if not isinstance(error, CheckpointException):
        return str(error)
    causes = {rank: wrapped[0] for rank, wrapped in error.failures.items()}
    if bugs := [cause for cause in causes.values() if explain_error(cause) is None]:
        raise bugs[0] from error
    prefixes = {rank: f"rank {rank}: " if rank else "" for rank in causes}
    return "; ".join(prefixes[rank] + short_reason(cause) for rank, cause in causes.items())


def assign_files(tensors: dict[str, Tensor]) -> dict[str, int]:
    """The number, from 1, of the file that each tensor is stored in.

    A file is put together in memory before it is written, so its size must be limited.
    """
    file_numbers, num_bytes = {}, 0
    for name, tensor in tensors.items():
        num_bytes += tensor.numel() * tensor.element_size()
        file_numbers[name] = 1 + num_bytes // FILE_BYTES
    return file_numbers


def restore(checkpoint: Checkpoint, state: Stateful, context: DistributedContext) -> None:
    """Load a checkpoint into a training state, at any world size and parallel layout. All ranks must call.

    A part that the checkpoint does not have, because it was added to the state later, stays as it is if it has no
    tensors.
    """
    state_dict = state.state_dict()
    tensors, _ = split_state(state_dict)
    read_tensors(checkpoint.path, tensors, alone=not context.is_distributed)
    loaded = {part: dict(checkpoint.state[part]) for part in state_dict if part in checkpoint.state}
    for name, tensor in tensors.items():
        part, _, key = name.partition(".")
        loaded.setdefault(part, {})[key] = tensor
    state.load_state_dict(loaded)


def read_tensors(path: Path, tensors: dict[str, Tensor], alone: bool) -> None:
    """Fill tensors in place, by name, from the checkpoint in the folder `path`.

    All ranks must call. With `alone`, only this rank does, and reads what it asks for without communication.
    """
    load_tensors(tensors, storage_reader=HuggingFaceStorageReader(str(path)), no_dist=alone)
