"""How ranks learn about each other outside of the training collectives: heartbeats, stop requests, a vote on them."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import HashStore  # type: ignore[attr-defined]

from distgpt.distributed.context import DistributedContext
from distgpt.distributed.rendezvous import connect_store


class HeartbeatStore:
    """A text per rank that the other ranks can read, and one stop request for all, in torchrun's key-value store.

    A process of world size 1 uses a store in its own memory. Methods raise RuntimeError if torchrun is gone.
    """

    def __init__(self, context: DistributedContext) -> None:
        """Connect and publish a first text. All ranks must call."""
        self._store = HashStore() if context.world_size == 1 else connect_store("heartbeats")
        self._keys = [f"rank {rank}" for rank in range(context.world_size)]
        self._rank = context.rank
        self.publish("joined")
        context.all_gather_object(None)  # `read` would wait for a rank that has not published yet

    def publish(self, text: str) -> None:
        """Set the text of this rank."""
        self._store.set(self._keys[self._rank], text)

    def read(self) -> dict[int, str]:
        """The text of every other rank."""
        others = [rank for rank in range(len(self._keys)) if rank != self._rank]
        texts = self._store.multi_get([self._keys[rank] for rank in others]) if others else []
        return {rank: raw.decode() for rank, raw in zip(others, texts, strict=True)}

    def request_stop(self, reason: str) -> None:
        """Ask all ranks to stop."""
        self._store.set("stop", reason)

    def stop_requested(self) -> str:
        """The reason that a rank has given for all to stop; empty if none has."""
        return str(self._store.get("stop").decode()) if self._store.check(["stop"]) else ""


class AsyncMax:
    """The maximum of all ranks' numbers, by an asynchronous all-reduce on a gloo group of its own.

    Each call returns the result of the call before, so that the exchange overlaps with the work between two calls and
    no rank waits for a device.
    """

    def __init__(self, world_size: int) -> None:
        """Create the group. All ranks must call."""
        self._group = dist.new_group(backend="gloo") if world_size > 1 else None
        self._pending: tuple[dist.Work, Tensor] | None = None

    def __call__(self, number: int) -> int:
        """Exchange `number` (0 or more) and return the previous maximum, 0 at first. All ranks must call equally often.

        A single process gets its own number back at once.
        """
        if self._group is None:
            return number
        maximum = 0
        if self._pending is not None:
            work, tensor = self._pending
            work.wait()
            maximum = int(tensor)
        tensor = torch.tensor([number])
        self._pending = dist.all_reduce(tensor, dist.ReduceOp.MAX, self._group, async_op=True), tensor
        return maximum
