"""Document masking without a mask tensor: where documents begin in a batch, and attention within each of them.

The end-of-text token doubles as a beginning-of-text token: it belongs to the document that it precedes. A sequence that
begins inside a document sees only the rest of that document.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from distgpt.models.attention_kernels import autocast_disabled


class DocumentIndex(NamedTuple):
    """How the P = B x T positions of a batch are regrouped so that each document becomes a row of its own.

    Documents are bucketed by length: a group is a matrix with one document per row, padded on the right. Under causal
    attention no real position sees the padding that follows it, so no mask is needed.
    """

    positions_BT: Tensor
    """Each token's position in its document, from 0."""
    groups: tuple[Tensor, ...]
    """Indices into the P positions, one document per row; padded with the document's last position."""
    inverse_P: Tensor
    """Where each position is in the concatenated, flattened groups."""

    def to(self, device: torch.device) -> DocumentIndex:
        """The same on `device`; from pinned memory the copies do not block the host."""
        return DocumentIndex(
            self.positions_BT.to(device, non_blocking=True),
            tuple(group.to(device, non_blocking=True) for group in self.groups),
            self.inverse_P.to(device, non_blocking=True),
        )


def index_documents(ids_BT: Tensor, end_of_text: int) -> DocumentIndex:
    """The documents of a batch of token ids on the CPU. Lengths within a group differ by less than a factor of 2."""
    starts_BT = ids_BT == end_of_text
    starts_BT[:, 0] = True
    P = ids_BT.numel()
    starts = starts_BT.flatten().nonzero().flatten()
    lengths = torch.diff(starts, append=torch.tensor([P]))
    offset_P = torch.arange(P) - starts.repeat_interleave(lengths)
    length_classes = torch.frexp((lengths - 1).double()).exponent  # 0 for length 1, k for lengths 2^(k-1) + 1 to 2^k
    groups = []
    inverse_P = torch.empty(P, dtype=torch.int64)
    num_grouped = 0
    for length_class in sorted(set(length_classes.tolist())):
        in_class = length_classes == length_class
        group_starts, group_lengths = starts[in_class], lengths[in_class]
        columns = torch.arange(int(group_lengths.max()))
        group = group_starts[:, None] + torch.minimum(columns, group_lengths[:, None] - 1)
        non_pad = columns < group_lengths[:, None]
        inverse_P[group[non_pad]] = num_grouped + non_pad.flatten().nonzero().flatten()
        groups.append(group)
        num_grouped += group.numel()
    return DocumentIndex(offset_P.view_as(ids_BT), tuple(groups), inverse_P)


# Shapes vary by batch, so this stays eager: a compiled block breaks its graph here.
@torch.compiler.disable  # type: ignore[untyped-decorator]
def document_attention(documents: DocumentIndex, qkv_BTX: Tensor, n_head: int, p_dropout: float) -> Tensor:
    """Causal attention within each document; `qkv_BTX` holds queries, keys and values (X = 3 N H). Returns BTD.

    Work and memory follow the lengths of the documents, not T: at most four times the attention that they need.
    """
    B, T, _ = qkv_BTX.shape
    rows_PX = qkv_BTX.flatten(0, 1)
    outputs = []
    with autocast_disabled(qkv_BTX):
        for group in documents.groups:
            G, L = group.shape
            group_rows = rows_PX.index_select(0, group.flatten())
            q, k, v = rearrange(group_rows, "(G L) (qkv N H) -> qkv G N L H", G=G, L=L, qkv=3, N=n_head)
            out = F.scaled_dot_product_attention(q, k, v, dropout_p=p_dropout, is_causal=True)
            outputs.append(rearrange(out, "G N L H -> (G L) (N H)"))
    return torch.cat(outputs).index_select(0, documents.inverse_P).view(B, T, -1)
