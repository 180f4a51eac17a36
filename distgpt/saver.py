"""A run's tensors into checkpoints, in the background, and back.

The files are torch.distributed.checkpoint's, as safetensors: each rank writes its share, and any number of ranks reads
them. What makes a folder of them a checkpoint that nothing can lose is in `checkpoint`.
"""

from __future__ import annotations

import secrets
import threading
import time
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load as load_tensors
from torch.distributed.checkpoint.state_dict_saver import save as save_tensors

from distgpt import checkpoint, durable
from distgpt.checkpoint import Checkpoint
from distgpt.errors import CheckpointError, MachineError, UserError, diagnose, failure
from distgpt.world import World

FILE_BYTES = 2**28
"""Tensors that share a file of a checkpoint, before they are shared among the ranks."""

MOST_FAILURES = 3
"""Saves in a row that may fail (a full disk, say) before the run ends."""

warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # one process is fine

FLAT = StateDictOptions(flatten_optimizer_state_dict=True)


class Saver:
    """Saves a run in the background: training waits only while its tensors are copied. Every rank makes one.

    One save is in flight at most: the next one waits for it. A save that fails leaves the last checkpoint as it was and
    training goes on; the run ends when MOST_FAILURES in a row have failed, or the last one.
    """

    def __init__(self, output_dir: Path, keep: int, first_step: int, world: World) -> None:
        self.output_dir, self.keep = output_dir, keep
        self.world = world.aside()  # the main thread's collectives must not meet those of the background
        self.attempt = world.from_first(secrets.token_hex(4))
        self.step = first_step
        """Of the checkpoint saved last, or being saved."""
        self.thread: threading.Thread | None = None
        self.failure: BaseException | None = None
        self.failures = 0
        self.news: list[str] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        """Let a save in flight come to its end, unless a rank is lost that it would wait for.

        That it fails is an error, unless there is one already.
        """
        agreed = getattr(error, "everywhere", error is None)
        if self.thread is not None and (agreed or self.world.size == 1):
            self.thread.join()
        if agreed and not isinstance(error, UserError):
            self.wait(last=True)

    def save(
        self,
        step: int,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        state: dict[str, Any],
        also_flush: Path | None = None,
    ) -> float:
        """Copy the run's tensors and write them as the checkpoint of `step`, in the background. Every rank calls.

        `also_flush` is a file that must be on disk before the checkpoint is. Returns for how many seconds training
        waited. Raises what the save before it failed with, if that was one too many.
        """
        started_at = time.monotonic()
        self.wait()
        tensors = {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors_of(model, optimizer).items()}
        self.step = step
        arguments = (step, tensors, state, also_flush)
        self.thread = threading.Thread(target=self.work, args=arguments, name="saver", daemon=True)
        self.thread.start()
        return time.monotonic() - started_at

    def work(self, step: int, tensors: dict[str, Tensor], state: dict[str, Any], also_flush: Path | None) -> None:
        """Write a checkpoint; what goes wrong is kept for `wait`, and told at once by `report`."""
        if self.world.device.type == "cuda":
            torch.cuda.set_device(self.world.device)  # each thread has a device of its own
        try:
            write(self.output_dir, step, self.attempt, tensors, state, self.keep, self.world, also_flush)
            self.failures = 0
        except MachineError as error:  # on all ranks alike
            self.failures += 1
            self.failure = error
            self.news.append(f"warning: {error}")
        except BaseException as error:  # a rank is lost, or a bug
            self.failure = error

    def report(self) -> list[str]:
        """What became of saves since the last call and should be known."""
        return [self.news.pop(0) for _ in range(len(self.news))]

    def wait(self, last: bool = False) -> None:
        """Wait for the save in flight. Every rank calls, and raises alike what it failed with, if one too many have.

        After the `last` one a failure counts at once.
        """
        if self.thread is not None:
            self.thread.join()
        self.thread, error, self.failure = None, self.failure, None
        if error is None:
            return
        if not isinstance(error, MachineError):
            raise error
        if last or self.failures >= MOST_FAILURES:
            count = "" if self.failures < 2 else f" ({self.failures} saves in a row have failed)"
            raise MachineError(f"{error}{count}", everywhere=True)


def write(
    output_dir: Path,
    step: int,
    attempt: str,
    tensors: dict[str, Tensor],
    state: dict[str, Any],
    keep: int,
    world: World,
    also_flush: Path | None = None,
) -> None:
    """Write a checkpoint, then delete those that are no longer kept. Every rank calls; each writes its share.

    Raises MachineError, on every rank alike, where any rank fails to write or what it wrote does not read back.
    Earlier checkpoints are then as they were.
    """
    partial = checkpoint.partial_path(output_dir, step, attempt)
    try:
        world.together(lambda: world.is_first and checkpoint.begin(output_dir, step, attempt))
        writer = HuggingFaceStorageWriter(str(partial), file_numbers(tensors), save_distributed=True)  # flushes each
        save_tensors(tensors, storage_writer=writer, process_group=world.group, no_dist=world.size == 1)
        mine = f"shard-{world.rank + 1:05d}-"
        hashed = world.together(lambda: {p.name: checkpoint.describe(p) for p in partial.glob(f"{mine}*")})
        files = {name: described for part in world.gather(hashed) for name, described in part.items()}

        def finish() -> None:
            if not world.is_first:
                return
            if also_flush is not None:
                durable.sync(also_flush)
            checkpoint.seal(partial, files, state)
            checkpoint.publish(partial, output_dir, step)
            with suppress(OSError):  # the new one is safe; the next save deletes what this one could not
                checkpoint.prune(output_dir, step, keep)

        world.together(finish)
    except (CheckpointException, CheckpointError, MachineError) as error:
        reason = str(error)
        if isinstance(error, CheckpointException):
            causes = {rank: cause[0] for rank, cause in error.failures.items()}
            if bugs := [cause for cause in causes.values() if diagnose(cause) is None]:
                raise bugs[0] from error
            named = {rank: f"rank {rank}: " if rank else "" for rank in causes}
            reason = "; ".join(named[rank] + failure(cause) for rank, cause in causes.items())
        if world.is_first:
            durable.remove_leftovers(output_dir / "checkpoints", ".step-*")
        raise MachineError(
            f"checkpoint of step {step} not saved ({reason}); earlier ones are intact; "
            f"make room or mend it: {output_dir}",
            everywhere=True,
        ) from None


def file_numbers(tensors: dict[str, Tensor]) -> dict[str, int]:
    """Which file of a checkpoint each tensor goes to, from 1: a file is put together in memory before it is written."""
    numbers, filled = {}, 0
    for name, tensor in tensors.items():
        filled += tensor.numel() * tensor.element_size()
        numbers[name] = 1 + filled // FILE_BYTES
    return numbers


def restore(found: Checkpoint, model: nn.Module, optimizer: torch.optim.Optimizer, world: World) -> None:
    """Put a checkpoint's tensors into the model and its optimizer. Every rank calls, with any number of ranks."""
    parts = state_of(model, optimizer)
    tensors = {name: value for name, value in parts.items() if isinstance(value, Tensor)}
    read(found.path, tensors, alone=not world.grouped)
    owners: dict[str, dict[str, Any]] = {"model": {}, "optimizer": {}}
    for name, value in (parts | tensors).items():
        owner, _, rest = name.partition(".")
        owners[owner][rest] = value
    set_model_state_dict(model, owners["model"])
    set_optimizer_state_dict(model, optimizer, owners["optimizer"], options=FLAT)


def read(path: Path, tensors: dict[str, Tensor], alone: bool) -> None:
    """Fill tensors, by name, from a checkpoint. Every rank calls, unless it reads what it needs `alone`."""
    load_tensors(tensors, storage_reader=HuggingFaceStorageReader(str(path)), no_dist=alone)


def tensors_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """What a checkpoint's files hold: every tensor of model and optimizer by its canonical name."""
    return {name: value for name, value in state_of(model, optimizer).items() if isinstance(value, Tensor)}


def state_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Tensors of model and optimizer, and the optimizer's settings, which the config gives and no file holds."""
    state: dict[str, Any] = {f"model.{name}": value for name, value in get_model_state_dict(model).items()}
    return state | {
        f"optimizer.{name}": value for name, value in get_optimizer_state_dict(model, optimizer, options=FLAT).items()
    }
