"""Who and where this process is: rank, size, device; starting and ending the process group; the few collectives.

One process without torchrun is a World of size 1: the same calls, no communication. `torch.distributed` and the
environment are named here, so that the rest of the project can be read without them.
"""

from __future__ import annotations

import ctypes
import datetime
import gc
import json
import os
import re
import socket
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import PrefixStore, Store, TCPStore, rendezvous  # type: ignore[attr-defined]
from torch.distributed.elastic.multiprocessing.errors import record

from distgpt import errors
from distgpt.errors import ConfigError, MachineError, UserError, one_line

T = TypeVar("T")

__all__ = ["Peers", "Vote", "World", "is_interactive", "keep_freed_memory", "record", "start", "wandb_logged_in"]

MOST_THREADS = 4096
"""A larger OMP_NUM_THREADS is taken for a mistake and ignored."""

COLLECTIVE_TIMEOUT = datetime.timedelta(minutes=30)

JOIN_SECONDS = 900.0
"""How long ranks wait for each other at the start, unless the config says."""

LAUNCHER_SECONDS = 2.0
"""How long torchrun's store may refuse a connection before torchrun counts as gone."""

RESOLVE_SECONDS = 10.0
"""How long a name may stay unknown: a cluster's may come a little later than its machines."""


@dataclass(frozen=True)
class World:
    """This process among all processes of the run."""

    rank: int
    size: int
    local_size: int
    """Ranks on this machine."""
    device: torch.device
    threads: int
    """Threads each CPU operation uses; part of what a bit-identical rerun needs."""
    group: dist.ProcessGroup | None = None
    """What collectives go through; None for the group of all that torchrun started."""

    @property
    def grouped(self) -> bool:
        """Whether torchrun started us, so that there is a process group (of one rank, if need be)."""
        return dist.is_initialized()

    @property
    def restarts(self) -> int:
        """How often torchrun has started these ranks again by itself."""
        return restart_count()

    @property
    def memory_bytes(self) -> int:
        """Memory that this rank may use: its GPU's, or its share of the machine's (or container's)."""
        if self.device.type == "cuda":
            return int(torch.cuda.get_device_properties(self.device).total_memory)
        return host_memory_bytes() // self.local_size

    @property
    def peak_bytes(self) -> int | None:
        """Most memory this process has used at a time: tensors on a GPU, else what is resident; None if not known."""
        if self.device.type == "cuda":
            return int(torch.cuda.max_memory_allocated(self.device))
        return peak_resident_bytes()

    @property
    def is_first(self) -> bool:
        """Whether this rank speaks and writes for all."""
        return self.rank == 0

    def sum(self, tensor: Tensor) -> Tensor:
        """The tensor summed over all ranks. Every rank calls, every rank gets the total."""
        if self.size > 1:
            tensor = tensor.clone()
            dist.all_reduce(tensor, group=self.group)
        return tensor

    def gather(self, value: Any) -> list[Any]:
        """Every rank's `value` (anything JSON holds) in rank order, on every rank. Every rank calls."""
        if self.size == 1:
            return [value]
        raw = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
        dist.all_gather(sizes, torch.tensor([len(raw)]), group=self.group)
        longest = int(max(sizes))
        padded = torch.zeros(longest, dtype=torch.uint8)
        padded[: len(raw)] = raw
        parts = [torch.zeros_like(padded) for _ in range(self.size)]
        dist.all_gather(parts, padded, group=self.group)
        return [json.loads(bytes(part[: int(size)].tolist())) for part, size in zip(parts, sizes, strict=True)]

    def from_first(self, value: T) -> T:
        """Rank 0's `value` (anything JSON holds), on every rank. Every rank calls."""
        shared: T = self.gather(value if self.is_first else None)[0]
        return shared

    def together(self, action: Callable[[], T]) -> T:
        """Run `action` and return its result. Every rank calls.

        A UserError or an OSError on any rank is raised on all of them, so that none waits for one that has left.
        """
        result, failure = None, None
        try:
            result = action()
        except (UserError, OSError) as error:
            kind = type(error).__name__ if isinstance(error, UserError) else MachineError.__name__
            failure = [kind, str(error) if isinstance(error, UserError) else errors.failure(error)]
        for rank, failed in enumerate(self.gather(failure)):
            if failed is not None:
                kind, text = failed
                prefix = f"rank {rank}: " if rank else ""
                raise getattr(errors, kind)(prefix + text, everywhere=True)
        return result  # type: ignore[return-value]

    def by_first(self, action: Callable[[], T]) -> T:
        """What `action` returns on rank 0 (anything JSON holds), on every rank. Every rank calls, and raises alike."""
        return self.from_first(self.together(lambda: action() if self.is_first else None))  # type: ignore[return-value]

    def first_rank_first(self, action: Callable[[], T]) -> T:
        """Run `action` on rank 0, then on the others: what it makes on disk is made once. As `together` otherwise."""
        first = self.together(lambda: action() if self.is_first else None)
        other = self.together(lambda: None if self.is_first else action())
        return first if self.is_first else other  # type: ignore[return-value]

    def check_same(self, values: dict[str, Any]) -> None:
        """Raise ConfigError on every rank, a line for each key, unless all hold the same `values`. Every rank calls."""
        everyone = self.gather(values)
        lines = []
        for key in values:
            found = [json.dumps(theirs.get(key)) for theirs in everyone]
            different = [rank for rank, text in enumerate(found) if text != found[0]]
            if different:
                rank = different[0]
                lines.append(
                    f"{key}: rank 0 has {found[0]} and rank {rank} has {found[rank]}, expected the same on every rank; "
                    "start all machines with the same files and arguments"
                )
        if lines:
            raise ConfigError("\n".join(lines), everywhere=True)

    def aside(self) -> World:
        """The same world for another thread, whose collectives do not meet this one's. Every rank calls."""
        return replace(self, group=dist.new_group(backend="gloo") if self.size > 1 else None)

    def open_vote(self) -> Vote:
        """A vote among all ranks. Every rank calls."""
        return Vote(self.size)

    def open_peers(self) -> Peers | None:
        """What ranks tell of themselves; None for a process by itself. Every rank calls."""
        if self.size == 1:
            return None
        peers = Peers(self.rank, self.size)
        self.gather(None)  # all have told something
        return peers

    def close(self) -> None:
        """Leave the process group in step with the other ranks. Every rank calls, with nothing left that uses it."""
        if self.grouped:
            gc.collect()
            dist.barrier()
            dist.destroy_process_group()


class Vote:
    """The largest of all ranks' numbers, on a group of its own: asked for by one call and told by the next.

    So the exchange overlaps with the work between two calls, and nothing waits for a device.
    """

    def __init__(self, size: int) -> None:
        self.group = dist.new_group(backend="gloo") if size > 1 else None
        self.pending: tuple[dist.Work, Tensor] | None = None

    def __call__(self, mine: int) -> int:
        """Every rank calls, equally often; all get the same answer."""
        if self.group is None:
            return mine
        agreed = 0
        if self.pending is not None:
            work, number = self.pending
            work.wait()
            agreed = int(number)
        number = torch.tensor([mine])
        work = dist.all_reduce(number, dist.ReduceOp.MAX, self.group, async_op=True)
        self.pending = work, number
        return agreed


class Peers:
    """A board on torchrun's key-value store, where each rank gives signs of life that the others read when in doubt."""

    def __init__(self, rank: int, size: int) -> None:
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        # A connection of its own: one that waits for a collective's peers would keep us waiting too.
        self.store = TCPStore(host, port, is_master=False, wait_for_workers=False)
        self.keys = {other: f"distgpt/{restart_count()}/{other}" for other in range(size)}
        self.stop_key = f"distgpt/{restart_count()}/stop"
        self.rank = rank
        self.seen: dict[int, tuple[str, float]] = {}
        self.tell("here")

    def tell(self, text: str) -> None:
        """Write what the others read of this rank."""
        self.store.set(self.keys[self.rank], text)

    def stop(self, reason: str) -> None:
        """Tell all ranks to leave, since this one does."""
        self.store.set(self.stop_key, reason)

    def stopping(self) -> str:
        """The reason that a rank has given for all to leave, or nothing."""
        return str(self.store.get(self.stop_key).decode()) if self.store.check([self.stop_key]) else ""

    def read(self) -> dict[int, tuple[str, float]]:
        """What every other rank last told, and for how many seconds, as far as we looked, it has told the same."""
        others = [rank for rank in self.keys if rank != self.rank]
        now = time.monotonic()
        for rank, raw in zip(others, self.store.multi_get([self.keys[rank] for rank in others]), strict=True):
            if self.seen.get(rank, ("", 0.0))[0] != raw.decode():
                self.seen[rank] = raw.decode(), now
        return {rank: (text, now - since) for rank, (text, since) in self.seen.items()}


def restart_count() -> int:
    """How often torchrun has restarted, so far, the ranks that it had started."""
    count = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return int(count) if count.isascii() and count.isdecimal() else 0


def start(device: str, join_seconds: float = JOIN_SECONDS) -> World:
    """Find out who this process is, choose its device and join the others. Every rank calls, once, first.

    `device` is the config's key. Raises MachineError where the environment or the device cannot be used, or where not
    all ranks have come within `join_seconds`.
    """
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    given = {name: os.environ[name] for name in names if name in os.environ}
    if given and not {"RANK", "WORLD_SIZE"} <= given.keys():
        missing = ", ".join(name for name in ("RANK", "WORLD_SIZE") if name not in given)
        raise MachineError(
            f"environment: got {', '.join(given)} without {missing}; start with torchrun, or unset them for one process"
        )
    try:
        rank, size = int(given.get("RANK", 0)), int(given.get("WORLD_SIZE", 1))
        local_rank, local_size = int(given.get("LOCAL_RANK", rank)), max(1, int(given.get("LOCAL_WORLD_SIZE", 1)))
    except ValueError:
        raise MachineError(f"environment: got {given}, expected whole numbers; start with torchrun") from None
    if not 0 <= rank < size:
        raise MachineError(f"environment: got RANK={rank}, expected 0 to {size - 1} (WORLD_SIZE={size}); use torchrun")
    chosen = choose_device(device, local_rank, size)
    threads = choose_threads(local_size)
    torch.set_num_threads(threads)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    if given:
        if size == local_size and sys.platform == "linux":
            os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # gloo has no authentication: keep it off the network
        join_group(chosen, rank, size, local_rank, join_seconds)
    return World(rank, size, local_size, chosen, threads)


def choose_device(device: str, local_rank: int, size: int) -> torch.device:
    """The device for this rank; raises ConfigError for what names none, MachineError if it does not exist."""
    if not re.fullmatch(r"auto|cpu|cuda(:\d{1,4})?|mps", device):
        raise ConfigError(f"device: got {device!r}, expected auto, cpu, cuda, cuda:N or mps; choose one of them")
    if device == "auto":
        if torch.cuda.is_available():
            device = "cuda"
        else:
            device = "mps" if torch.backends.mps.is_available() and size == 1 else "cpu"
    if device == "mps":
        if not torch.backends.mps.is_available():
            raise MachineError("device: got mps, but this torch finds no Apple GPU; use device=auto or device=cpu")
        if size > 1:
            raise MachineError(f"device: got mps with {size} ranks, expected one process; use device=cpu")
    if device.startswith("cuda"):
        if not torch.cuda.is_available():
            raise MachineError(
                f"device: got {device}, but this torch ({torch.__version__}) finds no NVIDIA GPU; "
                "use device=auto or device=cpu"
            )
        if ":" in device and size > 1:
            raise MachineError(f"device: got {device} with {size} ranks, expected cuda: each rank takes its own GPU")
        index = int(device.partition(":")[2] or local_rank)
        if index >= torch.cuda.device_count():
            raise MachineError(
                f"device: got cuda:{index}, but this machine has {torch.cuda.device_count()} GPU(s); "
                "start at most one rank for each"
            )
        return torch.device("cuda", index)
    return torch.device(device)


def choose_threads(local_size: int) -> int:
    """OMP_NUM_THREADS if set (but for torchrun's own 1), else this machine's processors shared among its ranks."""
    given = os.environ.get("OMP_NUM_THREADS", "")
    by_torchrun = given == "1" and local_size > 1  # torchrun's default, whatever the number of processors
    if given.isascii() and given.isdecimal() and 0 < int(given) <= MOST_THREADS and not by_torchrun:
        return int(given)
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, usable // local_size)


def join_group(device: torch.device, rank: int, size: int, local_rank: int, join_seconds: float) -> None:
    """Start the process group, once all ranks are there: gloo for CPU tensors, NCCL for GPU tensors."""
    backend, device_id = ("cpu:gloo,cuda:nccl", device) if device.type == "cuda" else ("gloo", None)
    address = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
    try:
        store, missing = meet(rank, size, join_seconds)
        if store is not None and not missing:
            dist.init_process_group(
                backend, store=store, rank=rank, world_size=size, timeout=COLLECTIVE_TIMEOUT, device_id=device_id
            )
    except (RuntimeError, ValueError, OSError) as error:
        reason = one_line((str(error).splitlines() or ["what listens there does not answer"])[0])
        raise MachineError(
            f"process group: could not meet the other ranks at {address} ({reason}); start all ranks with torchrun, or "
            "correct MASTER_ADDR and MASTER_PORT"
        ) from None
    if missing:
        listed = ", ".join(map(str, missing[:8])) + (", ..." if len(missing) > 8 else "")
        raise MachineError(
            f"process group: rank {listed} of {size} did not come to {address} within {join_seconds:g} s, expected "
            "all; start them all, with this MASTER_ADDR and MASTER_PORT",
            everywhere=rank - local_rank not in missing,  # else nobody here would speak
        )


def meet(rank: int, size: int, join_seconds: float) -> tuple[Store | None, list[int]]:
    """The ranks' common key-value store, and which ranks have not come to it within so many seconds."""
    until = time.monotonic() + join_seconds
    if not reach_store(rank, until):
        return None, [0]
    left = max(1.0, until - time.monotonic())
    # Told of one rank only, the store waits for none: we do, and know who is missing. On a thread, since its client
    # would wait for ever where something else listens.
    opening = rendezvous("env://", rank, 1, timeout=datetime.timedelta(seconds=left))
    store, _, _ = ThreadPoolExecutor(1).submit(next, opening).result(left + 1)
    store = PrefixStore(f"distgpt/{restart_count()}/group", store)  # torchrun keeps one store for all restarts
    store.set_timeout(COLLECTIVE_TIMEOUT)
    keys = [f"rank {other}" for other in range(size)]
    store.set(keys[rank], "here")
    while True:
        if store.check(["missing"]):
            return store, json.loads(store.get("missing"))
        if store.check(keys):
            return store, []
        if time.monotonic() > until:
            missing = [other for other in range(size) if not store.check([keys[other]])]
            store.set("missing", json.dumps(missing))
            time.sleep(1.0)  # the others read it before rank 0, which may hold the store, is gone
            return store, missing
        time.sleep(0.1)


def reach_store(rank: int, until: float) -> bool:
    """Wait until somebody listens at the store's address, where rank 0 may be about to; whether anybody does.

    The store's own client would wait as well, but for a misspelt name too, and tell it in a C++ stack. Raises OSError.
    """
    host, port = os.environ.get("MASTER_ADDR", ""), os.environ.get("MASTER_PORT", "")
    if not host or not port.isdecimal() or int(port) >= 2**16:
        raise ValueError(f"got MASTER_ADDR={host!r} and MASTER_PORT={port!r}, expected a machine and a port")
    # torchrun keeps the store, and had it before it started us: where nobody listens, it is gone.
    by_torchrun = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    resolved_by = min(until, time.monotonic() + RESOLVE_SECONDS)
    listened_by = time.monotonic() + LAUNCHER_SECONDS
    while True:
        try:
            socket.getaddrinfo(host, int(port))
            if rank > 0 or by_torchrun:
                socket.create_connection((host, int(port)), max(1.0, until - time.monotonic())).close()
            return True
        except socket.gaierror:
            if time.monotonic() > resolved_by:
                raise
        except OSError:
            if by_torchrun and time.monotonic() > listened_by:
                raise
            if time.monotonic() > until:
                return False
        time.sleep(0.2)


def keep_freed_memory() -> None:
    """Let the C library reuse large blocks instead of returning them: fresh memory costs page faults in each step.

    glibc only. To be called after compiling, which would leave small blocks between the large ones; gains are in
    bench/README.md.
    """
    m_trim_threshold, m_mmap_max = -1, -4  # malloc.h
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # another C library
        return
    mallopt(m_mmap_max, 0)
    mallopt(m_trim_threshold, 2**31 - 1)


def host_memory_bytes() -> int:
    """This machine's memory, or the container's limit if that is lower."""
    found = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            found.append(int(Path(path).read_text()))
        except (OSError, ValueError):  # no such file, or no limit ("max")
            pass
    return min(found)


def peak_resident_bytes() -> int | None:
    """Most memory this process has had resident; None where the system does not tell."""
    try:
        # Not getrusage: its figure goes on from the process that this one was forked from.
        found = re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())
        return int(found[1]) * 1024 if found else None
    except OSError:
        return None


def is_interactive() -> bool:
    """Whether a person watches standard output on a terminal that can redraw a line."""
    return sys.stdout is not None and sys.stdout.isatty() and os.environ.get("TERM") != "dumb"


def wandb_logged_in() -> bool:
    """Whether Weights & Biases has credentials here, found out without importing it."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    for name in ("~/.netrc", "~/_netrc"):
        try:
            if "api.wandb.ai" in Path(name).expanduser().read_text(encoding="utf-8"):
                return True
        except (OSError, RuntimeError, UnicodeDecodeError):  # no file, no home, not text
            pass
    return False
