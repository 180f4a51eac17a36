"""Batches: from windows of tokens to micro-batches on the device, read ahead in the background."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from distgpt.data.dataset import TokenWindows
from distgpt.data.sampler import Sampler
from distgpt.data.token_files import TokenArray
from distgpt.errors import UserError
from distgpt.models.cross_entropy import IGNORE_INDEX
from distgpt.models.document_mask import DocumentIndex, index_documents

PREFETCH_STEPS = 2


class Batch(NamedTuple):
    """The input of one forward pass."""

    ids_BT: Tensor
    """Token ids (int64)."""
    targets_BT: Tensor
    """The id that follows each token, or IGNORE_INDEX (int64)."""
    documents: DocumentIndex | None = None
    """Where documents begin, if attention is to stay within them."""

    def to(self, device: torch.device) -> Batch:
        """The batch on `device`; from pinned memory the copy does not block the host."""
        ids_BT, targets_BT = (tensor.to(device, non_blocking=True) for tensor in (self.ids_BT, self.targets_BT))
        return Batch(ids_BT, targets_BT, self.documents and self.documents.to(device))


@dataclass(frozen=True)
class TrainLoader:
    """The training batches of one data-parallel rank."""

    windows: TokenWindows
    sampler: Sampler
    end_of_text: int | None = None
    """The token that begins a document, where attention stays within documents."""

    def micro_batches(self, step: int) -> list[Batch]:
        """This rank's micro-batches at `step` (from 0). An empty one becomes a row without targets."""
        window_ids, T = self.sampler.windows_at_step(step), self.windows.seq_len
        batches, first = [], 0
        for size in self.sampler.plan.micro_batch_sizes(self.sampler.dp_rank):
            rows = [self.windows[int(window_id)] for window_id in window_ids[first : first + size]]
            batches.append(make_batch(rows, T, size or 1, self.end_of_text))
            first += size
        return batches

    def iterate(self, first_step: int, last_step: int, device: torch.device) -> Iterator[list[Batch]]:
        """The micro-batches of steps first_step .. last_step - 1 on `device`, prefetched by a thread."""
        from torchdata import nodes

        node: nodes.BaseNode = nodes.IterableWrapper(range(first_step, last_step))
        node = nodes.Mapper(node, self._micro_batches_or_error)
        if device.type == "cuda":
            node = nodes.PinMemory(node)
        node = nodes.Prefetcher(node, prefetch_factor=PREFETCH_STEPS)
        for batches in nodes.Loader(node):
            if isinstance(batches, UserError):
                raise batches
            yield [batch.to(device) for batch in batches]

    def _micro_batches_or_error(self, step: int) -> list[Batch] | UserError:
        """An error as a value: raised in the prefetching thread, it would be wrapped in that thread's traceback."""
        try:
            return self.micro_batches(step)
        except UserError as error:
            return error


def validation_batches(
    tokens: TokenArray,
    n_vocab: int,
    seq_len: int,
    batch_size: int,
    dp_rank: int,
    dp_size: int,
    max_tokens: int | None = None,
    end_of_text: int | None = None,
) -> Iterator[Batch]:
    """This rank's share of a stream read in order: over all ranks, each token but the first is a target exactly once.

    Every rank gets the same number of batches of the same shape, so that a model whose forward communicates can be
    evaluated. The last batches are padded with positions without targets. Only the first `max_tokens` targets count.
    """
    num_targets = len(tokens) - 1 if max_tokens is None else min(len(tokens) - 1, max_tokens)
    windows = range(0, num_targets, seq_len)
    rank_windows = windows[dp_rank::dp_size]
    most_windows = -(-len(windows) // dp_size)
    for first in range(0, most_windows, batch_size):
        starts = rank_windows[first : first + batch_size]
        rows = [tokens.read(start, min(start + seq_len, num_targets) + 1, n_vocab) for start in starts]
        yield make_batch(rows, seq_len, min(batch_size, len(windows)), end_of_text)


def make_batch(windows: Sequence[np.ndarray], seq_len: int, size: int, end_of_text: int | None) -> Batch:
    """Windows of at most seq_len + 1 tokens as `size` rows; positions that they do not fill have no target."""
    ids = np.zeros((size, seq_len), dtype=np.int64)
    targets = np.full((size, seq_len), IGNORE_INDEX, dtype=np.int64)
    for row, window in enumerate(windows):
        ids[row, : len(window) - 1] = window[:-1]
        targets[row, : len(window) - 1] = window[1:]
    ids_BT = torch.from_numpy(ids)
    documents = None if end_of_text is None else index_documents(ids_BT, end_of_text)
    return Batch(ids_BT, torch.from_numpy(targets), documents)
