"""Key/value cache for generation: each new token costs one position instead of a whole sequence."""

from __future__ import annotations

import torch
from torch import Tensor


class KVCache:
    """The keys and values of the positions read so far, for each layer.

    The sequences of a batch are left-padded, so that all of them end at the same position.
    """

    def __init__(self, batch_size: int, max_seq_len: int) -> None:
        self.batch_size, self.max_seq_len = batch_size, max_seq_len
        self.length = 0
        """Positions stored in every layer; the model's forward advances it after its last layer."""
        self.starts_BS = torch.empty(batch_size, 0, dtype=torch.bool)
        """Whether a document starts at a position; the model's forward maintains it."""
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}

    def append(self, layer: int, k_BNTH: Tensor, v_BNTH: Tensor) -> tuple[Tensor, Tensor]:
        """Store one layer's new keys and values; return all of that layer's, BNSH."""
        if layer not in self._layers:
            _, N, _, H = k_BNTH.shape
            shape = (self.batch_size, N, self.max_seq_len, H)
            self._layers[layer] = k_BNTH.new_empty(shape), v_BNTH.new_empty(shape)
        end = self.length + k_BNTH.shape[2]
        k_BNSH, v_BNSH = self._layers[layer]
        k_BNSH[:, :, self.length : end] = k_BNTH
        v_BNSH[:, :, self.length : end] = v_BNTH
        return k_BNSH[:, :, :end], v_BNSH[:, :, :end]
