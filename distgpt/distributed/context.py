"""Rank, world size, device, mesh and collectives of this process: the `DistributedContext`.

One process without torchrun has a context of world size 1: the same calls, without communication. This and
`rendezvous` are the only modules that initialize `torch.distributed`.
"""

from __future__ import annotations

import gc
import json
import os
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from distgpt import errors
from distgpt.distributed.memory import host_memory_bytes, peak_resident_bytes
from distgpt.distributed.rendezvous import join_process_group, restart_count
from distgpt.errors import ConfigError, RuntimeEnvironmentError, UserError

T = TypeVar("T")

__all__ = ["DistributedContext", "init_distributed", "resolve_device", "resolve_num_threads", "restart_count"]

MAX_THREADS = 4096
"""A larger OMP_NUM_THREADS is taken for a mistake and ignored."""

JOIN_SECONDS = 900.0
"""How long ranks wait for each other at the start, unless the caller says otherwise."""


@dataclass(frozen=True)
class DistributedContext:
    """This process's rank, device, mesh and collectives."""

    rank: int
    world_size: int
    local_world_size: int
    """Ranks on this machine."""
    device: torch.device
    num_threads: int
    """Intra-op threads; part of what a bit-identical rerun needs."""
    group: dist.ProcessGroup | None = None
    """The process group of this context's collectives; None for the default group of all ranks."""
    mesh: DeviceMesh | None = None
    """The ranks as an array with the dimensions "dp_replicate" and "dp_shard"; None before `with_mesh` and in a
    process that torchrun did not start."""

    @property
    def is_distributed(self) -> bool:
        """Whether torchrun started this process, so that there is a process group (perhaps of one rank)."""
        return dist.is_initialized()

    @property
    def is_rank0(self) -> bool:
        """Whether this is the rank that prints and writes for all."""
        return self.rank == 0

    @property
    def dp_rank(self) -> int:
        """Rank among the data-parallel ranks, which read different sequences."""
        return self._data_parallel()[0]

    @property
    def dp_size(self) -> int:
        """Number of data-parallel ranks."""
        return self._data_parallel()[1]

    def _data_parallel(self) -> tuple[int, int]:
        """(rank, size) over the mesh's dimensions whose names start with "dp_", the first varying slowest."""
        if self.mesh is None:
            return self.rank, self.world_size
        rank, size = 0, 1
        for name in self.mesh.mesh_dim_names or ():
            if name.startswith("dp_"):
                dimension = self.mesh[name]
                rank, size = rank * dimension.size() + dimension.get_local_rank(), size * dimension.size()
        return rank, size

    @property
    def restart_count(self) -> int:
        """How many times torchrun has restarted these ranks."""
        return restart_count()

    @property
    def memory_bytes(self) -> int:
        """Memory that this rank may use: its GPU's, or its share of the machine's (or container's)."""
        if self.device.type == "cuda":
            return int(torch.cuda.get_device_properties(self.device).total_memory)
        return host_memory_bytes() // self.local_world_size

    @property
    def peak_bytes(self) -> int | None:
        """Peak memory of this process: tensors on a GPU, otherwise resident memory; None if unknown."""
        if self.device.type == "cuda":
            return int(torch.cuda.max_memory_allocated(self.device))
        return peak_resident_bytes()

    def all_reduce_sum(self, tensor: Tensor) -> Tensor:
        """The tensor summed over all ranks. All ranks must call."""
        if self.world_size > 1:
            tensor = tensor.clone()
            dist.all_reduce(tensor, group=self.group)
        return tensor

    def all_gather_object(self, value: Any) -> list[Any]:
        """The `value` of every rank in rank order. Values pass through JSON, never pickle. All ranks must call."""
        if self.world_size == 1:
            return [value]
        raw = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(self.world_size)]
        dist.all_gather(lengths, torch.tensor([len(raw)]), group=self.group)
        padded = torch.zeros(int(max(lengths)), dtype=torch.uint8)
        padded[: len(raw)] = raw
        parts = [torch.zeros_like(padded) for _ in range(self.world_size)]
        dist.all_gather(parts, padded, group=self.group)
        return [json.loads(bytes(part[: int(n)].tolist())) for part, n in zip(parts, lengths, strict=True)]

    def broadcast_object(self, value: T) -> T:
        """Rank 0's JSON-serializable `value`, on every rank. All ranks must call."""
        shared: T = self.all_gather_object(value if self.is_rank0 else None)[0]
        return shared

    def run_on_all_ranks(self, action: Callable[[], T]) -> T:
        """Run `action` on every rank and return its result. All ranks must call.

        A UserError or an OSError on any rank is raised on all of them, so that none waits for a rank that has exited.
        """
        result, failure = None, None
        try:
            result = action()
        except UserError as error:
            failure = [type(error).__name__, str(error)]
        except OSError as error:
            failure = [RuntimeEnvironmentError.__name__, errors.short_reason(error)]
        for rank, rank_failure in enumerate(self.all_gather_object(failure)):
            if rank_failure is not None:
                kind, text = rank_failure
                prefix = f"rank {rank}: " if rank else ""
                raise getattr(errors, kind)(prefix + text, on_all_ranks=True)
        return result  # type: ignore[return-value]

    def run_on_rank0(self, action: Callable[[], T]) -> T:
        """Run `action` on rank 0 and return its JSON-serializable result on every rank.

        All ranks must call. An error is raised on all of them, as in `run_on_all_ranks`.
        """
        result = self.run_on_all_ranks(lambda: action() if self.is_rank0 else None)
        return self.broadcast_object(result)  # type: ignore[return-value]

    def rank0_first(self, action: Callable[[], T]) -> T:
        """Run `action` on rank 0, then on the others: files that it creates are created once, by rank 0.

        All ranks must call. An error is raised on all of them, as in `run_on_all_ranks`.
        """
        on_rank0 = self.run_on_all_ranks(lambda: action() if self.is_rank0 else None)
        on_others = self.run_on_all_ranks(lambda: None if self.is_rank0 else action())
        return on_rank0 if self.is_rank0 else on_others  # type: ignore[return-value]

    def assert_same_on_ranks(self, values: dict[str, Any]) -> None:
        """Raise ConfigError on every rank, a line per key, unless all have equal `values`. All ranks must call."""
        all_values = self.all_gather_object(values)
        lines = []
        for key in values:
            shown = [json.dumps(rank_values.get(key)) for rank_values in all_values]
            different = [rank for rank, text in enumerate(shown) if text != shown[0]]
            if different:
                rank = different[0]
                lines.append(
                    f"{key}: rank 0 has {shown[0]} and rank {rank} has {shown[rank]}, expected the same on every rank; "
                    "start all machines with the same files and arguments"
                )
        if lines:
            raise ConfigError("\n".join(lines), on_all_ranks=True)

    def with_new_group(self) -> DistributedContext:
        """A copy with its own gloo group, for collectives on another thread. All ranks must call."""
        return replace(self, group=dist.new_group(backend="gloo") if self.world_size > 1 else None)

    def with_mesh(self, shard_size: int) -> DistributedContext:
        """A copy whose mesh shards over `shard_size` consecutive ranks and replicates over the rest.

        Unchanged where there is no process group. All ranks must call.
        """
        if not self.is_distributed:
            return self
        shape = (self.world_size // shard_size, shard_size)
        mesh = init_device_mesh(self.device.type, shape, mesh_dim_names=("dp_replicate", "dp_shard"))
        return replace(self, mesh=mesh)

    def close(self) -> None:
        """Leave the process group together with the other ranks. All ranks must call, when nothing uses it anymore."""
        if self.is_distributed:
            gc.collect()  # what is left of wrapped models must go before the group does
            dist.barrier()
            dist.destroy_process_group()


def init_distributed(device: str, join_seconds: float = JOIN_SECONDS) -> DistributedContext:
    """Read torchrun's environment, choose the device and join the process group. All ranks must call it once, first.

    `device` is the config's value. Raises RuntimeEnvironmentError if the environment or the device cannot be used, or
    not all ranks join within `join_seconds`.
    """
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    variables = {name: os.environ[name] for name in names if name in os.environ}
    if variables and not {"RANK", "WORLD_SIZE"} <= variables.keys():
        missing = ", ".join(name for name in ("RANK", "WORLD_SIZE") if name not in variables)
        raise RuntimeEnvironmentError(
            f"environment: got {', '.join(variables)} without {missing}; start with torchrun, or unset them for one "
            "process"
        )
    try:
        rank, world_size = int(variables.get("RANK", 0)), int(variables.get("WORLD_SIZE", 1))
        local_rank = int(variables.get("LOCAL_RANK", rank))
        local_world_size = max(1, int(variables.get("LOCAL_WORLD_SIZE", 1)))
    except ValueError:
        raise RuntimeEnvironmentError(
            f"environment: got {variables}, expected whole numbers; start with torchrun"
        ) from None
    if not 0 <= rank < world_size:
        raise RuntimeEnvironmentError(
            f"environment: got RANK={rank}, expected 0 to {world_size - 1} (WORLD_SIZE={world_size}); use torchrun"
        )
    resolved_device = resolve_device(device, local_rank, world_size)
    num_threads = resolve_num_threads(local_world_size)
    torch.set_num_threads(num_threads)
    if resolved_device.type == "cuda":
        torch.cuda.set_device(resolved_device)
    if variables:
        if world_size == local_world_size and sys.platform == "linux":
            os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # gloo has no authentication: keep it off the network
        join_process_group(resolved_device, rank, world_size, local_rank, join_seconds)
    return DistributedContext(rank, world_size, local_world_size, resolved_device, num_threads)


def resolve_device(device: str, local_rank: int, world_size: int) -> torch.device:
    """This rank's device for the config's value `device`.

    Raises ConfigError if the text does not name a device, RuntimeEnvironmentError if the device does not exist.
    """
    if not re.fullmatch(r"auto|cpu|cuda(:\d{1,4})?|mps", device):
        raise ConfigError(f"device: got {device!r}, expected auto, cpu, cuda, cuda:N or mps; choose one of them")
    if device == "auto":
        if torch.cuda.is_available():
            device = "cuda"
        else:
            device = "mps" if torch.backends.mps.is_available() and world_size == 1 else "cpu"
    if device == "mps":
        if not torch.backends.mps.is_available():
            raise RuntimeEnvironmentError(
                "device: got mps, but this torch finds no Apple GPU; use device=auto or device=cpu"
            )
        if world_size > 1:
            raise RuntimeEnvironmentError(
                f"device: got mps with {world_size} ranks, expected one process; use device=cpu"
            )
    if device.startswith("cuda"):
        if not torch.cuda.is_available():
            raise RuntimeEnvironmentError(
                f"device: got {device}, but this torch ({torch.__version__}) finds no NVIDIA GPU; "
                "use device=auto or device=cpu"
            )
        if ":" in device and world_size > 1:
            raise RuntimeEnvironmentError(
                f"device: got {device} with {world_size} ranks, expected cuda: each rank takes its own GPU"
            )
        index = int(device.partition(":")[2] or local_rank)
        if index >= torch.cuda.device_count():
            raise RuntimeEnvironmentError(
                f"device: got cuda:{index}, but this machine has {torch.cuda.device_count()} GPU(s); "
                "start at most one rank per GPU"
            )
        return torch.device("cuda", index)
    return torch.device(device)


def resolve_num_threads(local_world_size: int) -> int:
    """Intra-op threads: OMP_NUM_THREADS if the user set it, else this rank's share of the processors."""
    text = os.environ.get("OMP_NUM_THREADS", "")
    set_by_torchrun = text == "1" and local_world_size > 1  # its default, whatever the number of processors
    if text.isascii() and text.isdecimal() and 0 < int(text) <= MAX_THREADS and not set_by_torchrun:
        return int(text)
    num_processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, num_processors // local_world_size)
