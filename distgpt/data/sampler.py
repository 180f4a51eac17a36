"""Which sequences each rank reads at each step. The order is computed, not stored.

The stream of sequences is position p = 0, 1, 2, ...; epoch = p // windows; position p reads window
permutation(seed, epoch)[p % windows]. Step s takes positions [s G, (s + 1) G) for G sequences per update, and
data-parallel rank r of w takes every w-th of them, from the r-th. A resume needs only the step number, and any
number of ranks reads the same sequences at the same step.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from distgpt.config.schema import Config
from distgpt.errors import pluralize

ORDER_VERSION = 1
"""Version of the order of sequences. Checkpoints record it, since another order would change every resumed run."""

FEISTEL_ROUNDS = 8


@dataclass(frozen=True)
class BatchPlan:
    """How one update's sequences are shared: ranks x micro-steps x sequences, in sizes that differ by at most 1."""

    sequences: int
    """Sequences per update over all ranks."""
    batch_size: int
    """Most sequences in one forward pass of one rank."""
    dp_size: int
    """Data-parallel ranks."""

    @classmethod
    def from_config(cls, config: Config, dp_size: int) -> BatchPlan:
        """The plan of a run on `dp_size` data-parallel ranks."""
        return cls(config.sequences_per_step, config.batch_size, dp_size)

    @property
    def micro_steps(self) -> int:
        """Forward passes per update, the same on every rank."""
        return math.ceil(self.sequences / (self.batch_size * self.dp_size))

    @property
    def largest_micro_batch(self) -> int:
        """Most sequences that any rank feeds through the model at a time."""
        return math.ceil(math.ceil(self.sequences / self.dp_size) / self.micro_steps)

    def micro_batch_sizes(self, dp_rank: int) -> list[int]:
        """Sequences in each micro-step of a rank; a size may be 0."""
        rank_sequences = len(range(dp_rank, self.sequences, self.dp_size))
        return [len(range(i, rank_sequences, self.micro_steps)) for i in range(self.micro_steps)]

    def equation(self, seq_len: int) -> str:
        """The batch arithmetic in one human-readable line."""
        total = f"{self.sequences:,} sequences ({self.sequences * seq_len:,} tokens) per step"
        shares = {len(range(rank, self.sequences, self.dp_size)) for rank in (0, self.dp_size - 1)}
        steps = self.micro_steps
        sizes = sorted({size for share in shares for size in (share // steps, -(-share // steps))})
        per_rank = " or ".join([*(f"{size:,}" for size in sizes[:-1]), pluralize(sizes[-1], "sequence")])
        line = f"{total} = {pluralize(self.dp_size, 'rank')} x {per_rank} x {pluralize(steps, 'micro-step')}"
        capacity = self.dp_size * self.batch_size * steps
        if self.sequences * 2 <= capacity:
            line += f" (ranks are at most half full: global_batch_size={capacity} would fill them)"
        return line


@dataclass(frozen=True)
class Sampler:
    """The training order of one data-parallel rank: each window once per epoch over all ranks, shuffled by seed."""

    num_windows: int
    seed: int
    plan: BatchPlan
    dp_rank: int

    def window_ids(self, positions: np.ndarray) -> np.ndarray:
        """The window that each position of the endless stream reads."""
        epochs, offsets = positions // self.num_windows, positions % self.num_windows
        ids = np.empty_like(positions)
        for epoch in np.unique(epochs):
            in_epoch = epochs == epoch
            ids[in_epoch] = permute(offsets[in_epoch], self.num_windows, f"{self.seed}/{epoch}")
        return ids

    def windows_at_step(self, step: int, all_ranks: bool = False) -> np.ndarray:
        """The windows that this rank, or all ranks, read at `step` (from 0), in order."""
        G = self.plan.sequences
        offset, stride = (0, 1) if all_ranks else (self.dp_rank, self.plan.dp_size)
        return self.window_ids(np.arange(step * G + offset, (step + 1) * G, stride))


def permute(indices: np.ndarray, size: int, key: str) -> np.ndarray:
    """Where a keyed permutation of range(size) sends `indices`, in O(1) memory whatever the size.

    A balanced Feistel network (Luby & Rackoff 1988) permutes the numbers of 2k bits. Results of `size` or more are
    permuted again until they fall below it (cycle walking, Black & Rogaway 2002), fewer than four times on average.
    """
    half_bits = max(1, -(-(size - 1).bit_length() // 2))
    half, mask = np.uint64(half_bits), np.uint64(2**half_bits - 1)
    digest = hashlib.shake_256(key.encode()).digest(8 * FEISTEL_ROUNDS)
    round_keys = np.frombuffer(digest, dtype="<u8").astype(np.uint64)
    result = np.asarray(indices, dtype=np.uint64).copy()
    outside = np.ones(result.shape, dtype=bool)
    while outside.any():
        walking = result[outside]
        left, right = walking >> half, walking & mask
        for round_key in round_keys:
            left, right = right, left ^ (_mix_bits(right ^ round_key) & mask)
        result[outside] = (left << half) | right
        outside = result >= size
    return result.astype(np.int64)


def _mix_bits(x: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """Scramble 64-bit words with the finalizer of SplitMix64 (Steele, Lea & Flood 2014)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
