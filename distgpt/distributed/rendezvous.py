"""Joining the process group: wait for all ranks at the store of MASTER_ADDR and MASTER_PORT, and name missing ones."""

from __future__ import annotations

import datetime
import json
import os
import socket
import time
from concurrent.futures import ThreadPoolExecutor

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, Store, TCPStore, rendezvous  # type: ignore[attr-defined]

from distgpt.errors import RuntimeEnvironmentError, one_line

COLLECTIVE_TIMEOUT = datetime.timedelta(minutes=30)

LAUNCHER_SECONDS = 2.0
"""How long torchrun's store may refuse connections before torchrun counts as gone."""

RESOLVE_SECONDS = 10.0
"""How long MASTER_ADDR may fail to resolve: a cluster may register names a little after its machines start."""


def restart_count() -> int:
    """How many times torchrun has restarted the ranks it started."""
    count = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return int(count) if count.isascii() and count.isdecimal() else 0


def join_process_group(
    device: torch.device, rank: int, world_size: int, local_rank: int, timeout_seconds: float
) -> None:
    """Initialize the process group once all ranks are there: gloo for CPU tensors, NCCL for GPU tensors.

    Raises RuntimeEnvironmentError where the store cannot be reached or ranks are missing after `timeout_seconds`.
    """
    backend, device_id = ("cpu:gloo,cuda:nccl", device) if device.type == "cuda" else ("gloo", None)
    address = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
    try:
        store, missing = _rendezvous(rank, world_size, timeout_seconds)
        if store is not None and not missing:
            dist.init_process_group(
                backend, store=store, rank=rank, world_size=world_size, timeout=COLLECTIVE_TIMEOUT, device_id=device_id
            )
    except (RuntimeError, ValueError, OSError) as error:
        reason = one_line((str(error).splitlines() or ["the process that listens there does not answer"])[0])
        raise RuntimeEnvironmentError(
            f"process group: could not reach the other ranks at {address} ({reason}); start all ranks with torchrun, "
            "or correct MASTER_ADDR and MASTER_PORT"
        ) from None
    if missing:
        listed = ", ".join(map(str, missing[:8])) + (", ..." if len(missing) > 8 else "")
        raise RuntimeEnvironmentError(
            f"process group: rank {listed} of {world_size} did not join at {address} within {timeout_seconds:g} s, "
            "expected all ranks; start every rank, with this MASTER_ADDR and MASTER_PORT",
            on_all_ranks=rank - local_rank not in missing,  # otherwise no rank of this machine would report it
        )


def connect_store(name: str) -> Store:
    """A new connection to the ranks' key-value store, for keys under `name`. Call it after `join_process_group`.

    The process group's own connection is blocked while a rank waits for others.
    """
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    return _prefixed(TCPStore(host, port, is_master=False, wait_for_workers=False), name)


def _prefixed(store: Store, name: str) -> Store:
    """A view of the store for this start of the ranks alone: torchrun keeps one store for all restarts."""
    return PrefixStore(f"distgpt/{restart_count()}/{name}", store)


def _rendezvous(rank: int, world_size: int, timeout_seconds: float) -> tuple[Store | None, list[int]]:
    """The ranks' common key-value store, and the ranks that have not joined it in time."""
    deadline = time.monotonic() + timeout_seconds
    if not _wait_for_store(rank, deadline):
        return None, [0]
    remaining = max(1.0, deadline - time.monotonic())
    # With a world size of 1 the store waits for no other rank; the loop below does, and knows which are missing.
    # On a thread, since the store's client would wait forever if another program listens on this port.
    opening = rendezvous("env://", rank, 1, timeout=datetime.timedelta(seconds=remaining))
    store, _, _ = ThreadPoolExecutor(1).submit(next, opening).result(remaining + 1)
    store = _prefixed(store, "group")
    store.set_timeout(COLLECTIVE_TIMEOUT)
    keys = [f"rank {other}" for other in range(world_size)]
    store.set(keys[rank], "joined")
    while True:
        if store.check(["missing"]):
            return store, json.loads(store.get("missing"))
        if store.check(keys):
            return store, []
        if time.monotonic() > deadline:
            missing = [other for other in range(world_size) if not store.check([keys[other]])]
            store.set("missing", json.dumps(missing))
            time.sleep(1.0)  # the others must read it before rank 0, which may host the store, exits
            return store, missing
        time.sleep(0.1)


def _wait_for_store(rank: int, deadline: float) -> bool:
    """Wait until a process listens at the store's address; False if none does by the deadline. Raises OSError.

    Without torchrun, rank 0 hosts the store and does not wait. The store's own client would wait as long for a
    misspelled name too, and report it as a C++ stack.
    """
    host, port = os.environ.get("MASTER_ADDR", ""), os.environ.get("MASTER_PORT", "")
    if not host or not port.isdecimal() or int(port) >= 2**16:
        raise ValueError(f"got MASTER_ADDR={host!r} and MASTER_PORT={port!r}, expected a host and a port")
    # torchrun hosts the store and opens it before it starts the ranks: where nothing listens, torchrun is gone.
    hosted_by_torchrun = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    resolve_deadline = min(deadline, time.monotonic() + RESOLVE_SECONDS)
    launcher_deadline = time.monotonic() + LAUNCHER_SECONDS
    while True:
        try:
            socket.getaddrinfo(host, int(port))
            if rank > 0 or hosted_by_torchrun:
                socket.create_connection((host, int(port)), max(1.0, deadline - time.monotonic())).close()
            return True
        except socket.gaierror:
            if time.monotonic() > resolve_deadline:
                raise
        except OSError:
            if hosted_by_torchrun and time.monotonic() > launcher_deadline:
                raise
            if time.monotonic() > deadline:
                return False
        time.sleep(0.2)
