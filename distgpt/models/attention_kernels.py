"""Causal self-attention: the implementations a model can be built with, by name.

Each takes queries BNTH, keys and values BNSH, an optional boolean mask BNTS (True where a query may attend to a key;
None means causal) and the dropout probability of the attention weights, and returns BNTH. All compute in the dtype of
their inputs, also under autocast.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor

AttentionFunction = Callable[[Tensor, Tensor, Tensor, Tensor | None, float], Tensor]


def autocast_disabled(x: Tensor) -> AbstractContextManager[None]:
    """Keeps autocast from casting the inputs of attention; a no-op on devices without autocast, such as meta."""
    has_autocast = torch.amp.is_autocast_available(x.device.type)
    return torch.autocast(x.device.type, enabled=False) if has_autocast else nullcontext()


def sdpa(q_BNTH: Tensor, k_BNSH: Tensor, v_BNSH: Tensor, mask_BNTS: Tensor | None, p_dropout: float) -> Tensor:
    """torch's scaled dot-product attention (Vaswani et al. 2017, section 3.2.1), which picks a fused kernel."""
    with autocast_disabled(q_BNTH):
        return F.scaled_dot_product_attention(
            q_BNTH, k_BNSH, v_BNSH, attn_mask=mask_BNTS, dropout_p=p_dropout, is_causal=mask_BNTS is None
        )


def matmul_attention(
    q_BNTH: Tensor, k_BNTH: Tensor, v_BNTH: Tensor, mask_BNTS: Tensor | None, p_dropout: float
) -> Tensor:
    """Causal attention with explicit T x T weights; torch.compile fuses mask and softmax into one pass.

    With a mask (padding or a KV cache), the same as `sdpa`.
    """
    if mask_BNTS is not None:
        return sdpa(q_BNTH, k_BNTH, v_BNTH, mask_BNTS, p_dropout)
    with autocast_disabled(q_BNTH):
        T, H = q_BNTH.shape[-2:]
        future_TT = torch.ones(T, T, dtype=torch.bool, device=q_BNTH.device).triu(1)
        scores_BNTT = (q_BNTH / math.sqrt(H)) @ k_BNTH.mT
        weights_BNTT = scores_BNTT.masked_fill(future_TT, -math.inf).softmax(-1)
        return F.dropout(weights_BNTT, p_dropout) @ v_BNTH


ATTENTION: dict[str, AttentionFunction] = {"sdpa": sdpa, "sdpa-fp32": sdpa, "matmul": matmul_attention}
"""`sdpa-fp32` is `sdpa` on queries, keys and values that the caller has cast to fp32."""
