"""Where documents begin in a batch, and attention that stays within them without a mask.

A document begins with its end-of-text token, so that its first word is predicted from that token alone; a window that
begins inside a document sees its rest only.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor


class Documents(NamedTuple):
    """How the P = B x T positions of a batch are regrouped, so that each document is a row of its own.

    Documents of similar length share a group, a matrix of one row a document. Shorter ones are filled up on the right:
    under causal attention no real position sees what follows it, so that no mask is needed.
    """

    positions_BT: Tensor
    """Each token's place in its document, from 0."""
    groups: tuple[Tensor, ...]
    """Positions that make up each group, a document a row; filled up with the document's last."""
    place_P: Tensor
    """Where each position is in the groups, laid one after another and flattened."""

    def to(self, device: torch.device) -> Documents:
        """The same on `device`; from pinned memory the copies do not block the host."""
        positions_BT, groups, place_P = self
        return Documents(
            positions_BT.to(device, non_blocking=True),
            tuple(group.to(device, non_blocking=True) for group in groups),
            place_P.to(device, non_blocking=True),
        )


def find_documents(ids_BT: Tensor, end_of_text: int) -> Documents:
    """The documents of a batch of ids on the CPU. Lengths in a group differ by less than a factor of 2."""
    starts_BT = ids_BT == end_of_text
    starts_BT[:, 0] = True
    P = ids_BT.numel()
    starts = starts_BT.flatten().nonzero().flatten()
    lengths = torch.diff(starts, append=torch.tensor([P]))
    offset_P = torch.arange(P) - starts.repeat_interleave(lengths)
    powers = torch.frexp((lengths - 1).double()).exponent  # 0 for length 1, k for lengths 2^(k-1) + 1 to 2^k
    groups = []
    place_P = torch.empty(P, dtype=torch.int64)
    filled = 0
    for power in sorted(set(powers.tolist())):
        first, length = starts[powers == power], lengths[powers == power]
        columns = torch.arange(int(length.max()))
        group = first[:, None] + torch.minimum(columns, length[:, None] - 1)
        real = columns < length[:, None]
        place_P[group[real]] = filled + real.flatten().nonzero().flatten()
        groups.append(group)
        filled += group.numel()
    return Documents(offset_P.view_as(ids_BT), tuple(groups), place_P)


def attend_within(documents: Documents, qkv_BTX: Tensor, n_head: int, dropout_p: float) -> Tensor:
    """Causal attention within each document; `qkv_BTX` holds queries, keys and values (X = 3 N H). Returns BTD.

    Work and memory follow the documents' lengths, not T: at most four times the attention that they need. Each call
    has other shapes, so this is not to be compiled.
    """
    B, T, _ = qkv_BTX.shape
    rows_PX = qkv_BTX.flatten(0, 1)
    attended = []
    for group in documents.groups:
        G, L = group.shape
        rows = rows_PX.index_select(0, group.flatten())
        q, k, v = rearrange(rows, "(G L) (qkv N H) -> qkv G N L H", G=G, L=L, qkv=3, N=n_head)
        out = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout_p, is_causal=True)
        attended.append(rearrange(out, "G N L H -> (G L) (N H)"))
    return torch.cat(attended).index_select(0, documents.place_P).view(B, T, -1)
