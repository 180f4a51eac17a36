"""How a model is spread over the ranks of a run. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass

from distgpt.errors import pluralize


@dataclass(frozen=True)
class ParallelLayout:
    """A parallelization strategy with its settings, resolved for a number of ranks."""

    strategy: str = "none"
    """none (one rank), ddp, fsdp or hsdp."""
    world_size: int = 1
    shard_size: int = 1
    """Ranks that together hold one copy of the training state: 1 for none and ddp, all ranks for fsdp."""
    reshard_after_forward: bool = True
    """Whether a block's gathered weights are freed after forward and backward, or kept for the whole update."""
    sync_each_micro_step: bool = False
    """Whether gradients are reduced after each micro-step, or kept unsharded until the last."""
    activation_checkpointing: str = "none"
    """none, full or selective."""
    reduce_dtype: str = "fp32"
    """Dtype in which gradients are reduced: fp32 or bf16."""

    @property
    def is_sharded(self) -> bool:
        """Whether ranks hold shards of the parameters, gradients and optimizer state."""
        return self.strategy in ("fsdp", "hsdp")

    @property
    def num_replicas(self) -> int:
        """Copies of the training state."""
        return self.world_size // self.shard_size

    def describe(self) -> str:
        """The layout in a few words, for the run header."""
        parts = [] if self.strategy == "none" else [self.strategy]
        if self.strategy == "hsdp":
            parts = [f"hsdp ({pluralize(self.num_replicas, 'replica')} of {pluralize(self.shard_size, 'rank')})"]
        if self.activation_checkpointing != "none":
            parts.append(f"{self.activation_checkpointing} activation checkpointing")
        if self.reduce_dtype != "fp32":
            parts.append(f"gradients reduced in {self.reduce_dtype}")
        return ", ".join(parts)
