"""Which tokens this rank reads at step s, and getting them to the device in time.

Order is arithmetic, not state: sequence p of a run (p = 0, 1, 2, ...) is window permutation(seed, epoch)[p % windows],
epoch = p // windows. Step s takes sequences [s G, (s + 1) G); rank r of w takes every w-th of them. So a resume needs
only the step number, and any number of ranks reads the same sequences at the same step.

`python -m distgpt.data PATH` checks and shows any token file.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from distgpt.corpus import window_count
from distgpt.documents import Documents, find_documents
from distgpt.errors import ConfigError, DataError, Parser, UserError, file_name, leave, run_command
from distgpt.loss import IGNORED
from distgpt.plan import BatchPlan
from distgpt.shards import TokenArray, open_tokens
from distgpt.tokenizer import load_tokenizer

PREFETCHED_STEPS = 2
FEISTEL_ROUNDS = 8


class Batch(NamedTuple):
    """One forward pass: token ids and the id that follows each (or IGNORED), int64."""

    ids_BT: Tensor
    targets_BT: Tensor
    documents: Documents | None = None
    """Where documents begin, if attention is to stay within them."""

    def to(self, device: torch.device) -> Batch:
        """The batch on `device`; from pinned memory the copy does not block the host."""
        ids_BT, targets_BT = (tensor.to(device, non_blocking=True) for tensor in (self.ids_BT, self.targets_BT))
        return Batch(ids_BT, targets_BT, self.documents and self.documents.to(device))


def permute(indices: np.ndarray, size: int, key: str) -> np.ndarray:
    """Where a keyed permutation of range(size) sends `indices`, in O(1) memory whatever the size.

    A balanced Feistel network (Luby & Rackoff 1988) permutes the numbers of 2k bits; results past `size` are sent
    round again until they fall inside (cycle walking, Black & Rogaway 2002), fewer than four times on average.
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
            left, right = right, left ^ (mix(right ^ round_key) & mask)
        result[outside] = (left << half) | right
        outside = result >= size
    return result.astype(np.int64)


def mix(x: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """Scramble 64-bit words: the finaliser of SplitMix64 (Steele, Lea & Flood 2014)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


@dataclass(frozen=True)
class ShuffledReader:
    """The training stream of one rank: every window once an epoch over all ranks, in a seeded order."""

    tokens: TokenArray
    n_vocab: int
    seq_len: int
    seed: int
    plan: BatchPlan
    rank: int
    end_of_text: int | None = None
    """Token that begins a document, where documents are masked."""

    def windows(self, positions: np.ndarray) -> np.ndarray:
        """The window that each position of the endless stream reads."""
        size = window_count(len(self.tokens), self.seq_len)
        epochs, offsets = positions // size, positions % size
        result = np.empty_like(positions)
        for epoch in np.unique(epochs):
            chosen = epochs == epoch
            result[chosen] = permute(offsets[chosen], size, f"{self.seed}/{epoch}")
        return result

    def windows_at(self, step: int, all_ranks: bool = False) -> np.ndarray:
        """The windows that this rank, or all ranks, read at `step` (from 0), in order."""
        G = self.plan.sequences
        offset, stride = (0, 1) if all_ranks else (self.rank, self.plan.ranks)
        return self.windows(np.arange(step * G + offset, (step + 1) * G, stride))

    def at(self, step: int) -> list[Batch]:
        """This rank's micro-batches at `step`; where it has no sequence for one, a sequence without targets."""
        windows, T = self.windows_at(step), self.seq_len
        batches, first = [], 0
        for size in self.plan.micro_batches(self.rank):
            chosen = windows[first : first + size]
            first += size
            read = [self.tokens.read(w * T, (w + 1) * T + 1, self.n_vocab) for w in chosen]
            batches.append(to_batch(read, T, size or 1, self.end_of_text))
        return batches

    def steps(self, first: int, last: int, device: torch.device) -> Iterator[list[Batch]]:
        """The micro-batches of steps first .. last - 1, read ahead by a thread and copied to `device`."""
        from torchdata import nodes

        node: nodes.BaseNode = nodes.IterableWrapper(range(first, last))
        node = nodes.Mapper(node, self.at_or_error)
        if device.type == "cuda":
            node = nodes.PinMemory(node)
        node = nodes.Prefetcher(node, prefetch_factor=PREFETCHED_STEPS)
        for batches in nodes.Loader(node):
            if isinstance(batches, UserError):
                raise batches
            yield [batch.to(device) for batch in batches]

    def at_or_error(self, step: int) -> list[Batch] | UserError:
        """`at`, with its error as a value: raised in a prefetch thread, it would come out wrapped in a traceback."""
        try:
            return self.at(step)
        except UserError as error:
            return error


def held_out_batches(
    tokens: TokenArray,
    n_vocab: int,
    seq_len: int,
    batch_size: int,
    rank: int,
    ranks: int,
    max_tokens: int | None = None,
    end_of_text: int | None = None,
) -> Iterator[Batch]:
    """This rank's share of a stream read in order: over all ranks each token but the first is a target exactly once.

    Every rank gets the same number of batches of the same shape (the last are filled up with positions without
    targets), so that a model whose forward communicates can score them. `max_tokens` limits the targets to the first.
    """
    targets = len(tokens) - 1 if max_tokens is None else min(len(tokens) - 1, max_tokens)
    windows = range(0, targets, seq_len)
    mine = windows[rank::ranks]
    most = -(-len(windows) // ranks)
    for first in range(0, most, batch_size):
        chosen = mine[first : first + batch_size]
        read = [tokens.read(start, min(start + seq_len, targets) + 1, n_vocab) for start in chosen]
        yield to_batch(read, seq_len, min(batch_size, len(windows)), end_of_text)


def to_batch(windows: Sequence[np.ndarray], seq_len: int, size: int, end_of_text: int | None) -> Batch:
    """Windows of at most seq_len + 1 tokens as `size` rows; what they leave empty has no target."""
    ids = np.zeros((size, seq_len), dtype=np.int64)
    targets = np.full((size, seq_len), IGNORED, dtype=np.int64)
    for row, window in enumerate(windows):
        ids[row, : len(window) - 1] = window[:-1]
        targets[row, : len(window) - 1] = window[1:]
    ids_BT = torch.from_numpy(ids)
    documents = None if end_of_text is None else find_documents(ids_BT, end_of_text)
    return Batch(ids_BT, torch.from_numpy(targets), documents)


def main(arguments: Sequence[str]) -> None:
    """Check every token of a file and show what it holds."""
    parser = Parser(prog="python -m distgpt.data", description=main.__doc__)
    parser.add_argument(
        "path", type=file_name, metavar="PATH", help=".npz file with arrays train and val, or an .npy file"
    )
    parser.add_argument("--tokenizer", default="gpt2", help="encoding of the tokens (default gpt2)")
    parser.add_argument("--seq-len", type=int, default=128, help="window length to count windows for (default 128)")
    options = parser.parse_args(arguments)
    if options.seq_len < 1:
        raise ConfigError(f"command line: --seq-len: got {options.seq_len}, expected at least 1")
    tokenizer = load_tokenizer(options.tokenizer)
    arrays = open_tokens(Path(options.path))
    if not arrays:
        raise DataError(f"{options.path}: holds no arrays, expected train and val; make it with numpy.savez")
    for name, tokens in arrays.items():
        tokens.check(tokenizer.n_vocab)
        tokens.verify()
        print(
            f"{name}: {len(tokens):,} tokens ({tokens.dtype}), {window_count(len(tokens), options.seq_len):,} windows"
        )
        start = tokenizer.decode(tokens.read(0, min(len(tokens), 24), tokenizer.n_vocab).tolist())
        print(f"  begins {start!r}")


if __name__ == "__main__":
    leave(run_command(main))
