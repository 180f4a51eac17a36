"""Compare checksums of the replicas' weights, to find silent data corruption.

The checksum of a tensor is the XOR of its elements' bits: a single flipped bit always changes it.
"""

from __future__ import annotations

import hashlib

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from distgpt.distributed.context import DistributedContext
from distgpt.errors import NumericsError


def check_replicas(model: nn.Module, shard_size: int, step: int, context: DistributedContext) -> None:
    """Raise NumericsError, on every rank, unless ranks with the same weights have equal checksums. All ranks must call.

    `shard_size` ranks hold one replica.
    """
    world_size = context.world_size
    if shard_size == world_size:
        return
    shards = [p.to_local() if isinstance(p, DTensor) else p for p in (p.detach() for p in model.parameters())]
    tensor_hashes = torch.stack([torch.hash_tensor(shard).view(torch.int64) for shard in shards if shard.numel()])
    rank_hash = hashlib.sha256(repr(tensor_hashes.tolist()).encode()).hexdigest()
    hashes = context.all_gather_object(rank_hash)
    for shard in range(shard_size):
        ranks = range(shard, world_size, shard_size)
        shard_hashes = [hashes[rank] for rank in ranks]
        commonest = max(shard_hashes, key=shard_hashes.count)
        mismatched = [rank for rank in ranks if hashes[rank] != commonest]
        if mismatched:
            has_majority = shard_hashes.count(commonest) > len(ranks) / 2
            who = f"rank {mismatched[0]} holds" if has_majority else f"ranks {ranks[0]} and {mismatched[0]} hold"
            raise NumericsError(
                f"step {step}: {who} different weights, expected identical bits on ranks {list(ranks)}; "
                "suspect the hardware; the same command resumes from the last checkpoint",
                on_all_ranks=True,
            )
