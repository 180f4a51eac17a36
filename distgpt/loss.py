"""Hidden states to the summed loss of their next tokens, plainly or without ever holding all the logits."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

ExpRows = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]

IGNORED = -100
"""Target id of a position that has no target (padding): it adds nothing to the loss or to a gradient."""

TILE_BYTES = 64 * 2**20
"""Room for one tile of logits. Larger tiles leave the cache, smaller ones add up the weight's gradient too often."""


def plain_loss(x_PD: Tensor, weight_VD: Tensor, targets_P: Tensor, n_vocab: int) -> Tensor:
    """The sum over positions of -log softmax(x weight^T)[target] in nats (fp32 scalar), by autograd."""
    logits_PV = F.linear(x_PD, weight_VD[:n_vocab])
    wide_PV = logits_PV.to(torch.promote_types(logits_PV.dtype, torch.float32))
    return F.cross_entropy(wide_PV, targets_P, ignore_index=IGNORED, reduction="sum")


def tiled_loss(x_PD: Tensor, weight_VD: Tensor, targets_P: Tensor, n_vocab: int, exp_rows: ExpRows) -> Tensor:
    """`plain_loss`, a tile of positions at a time, with both gradients formed while the tile is at hand.

    Memory is one tile of logits instead of P x V; time is three matmuls and one exponential a logit. Computes in
    the autocast dtype where autocast is on; sums and the weight's gradient are kept in fp32 (fp64 for fp64 input).
    """
    device_type = x_PD.device.type
    dtype = torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else x_PD.dtype
    loss: Tensor = TiledLoss.apply(  # type: ignore[no-untyped-call]
        x_PD, weight_VD, targets_P, n_vocab, dtype, torch.is_grad_enabled(), exp_rows
    )
    return loss


class TiledLoss(torch.autograd.Function):
    """Gradients of a summed softmax cross-entropy, with e = exp(logits - max), s = sum(e), onehot = target's column:

    d loss / d logits = e / s - onehot. The division is folded into the thin operands, so that e is read as it is:
    dx = (e W) / s - W[target]   and   dW = e^T (x / s) - scatter(x to the target's row).
    """

    @staticmethod
    def forward(
        ctx: Any,
        x_PD: Tensor,
        weight_VD: Tensor,
        targets_P: Tensor,
        n_vocab: int,
        dtype: torch.dtype,
        needs_gradient: bool,
        exp_rows: ExpRows,
    ) -> Tensor:
        (P, D), V = x_PD.shape, len(weight_VD)
        wide = torch.promote_types(x_PD.dtype, torch.float32)
        R = max(64, TILE_BYTES // (V * dtype.itemsize) // 64 * 64)  # positions in a tile
        narrow_x_PD, narrow_weight_VD = x_PD.to(dtype), weight_VD.to(dtype)
        real_P, targets_P = targets_P != IGNORED, targets_P.clamp(min=0)
        logits_RV = narrow_x_PD.new_empty(min(R, P), V)
        e_RV, dw_tile_DV = torch.empty_like(logits_RV), narrow_x_PD.new_empty(D, V)
        dx_PD, dw_DV = torch.empty_like(x_PD, dtype=wide), x_PD.new_zeros(D, V, dtype=wide)
        losses_P = x_PD.new_empty(P, dtype=wide)
        for tile in zip(*(torch.split(t, R) for t in (narrow_x_PD, targets_P, real_P, losses_P, dx_PD)), strict=True):
            x_RD, targets_R, real_R, losses_R, dx_RD = tile
            logits_RV, e_RV = logits_RV[: len(x_RD)], e_RV[: len(x_RD)]
            torch.mm(x_RD, narrow_weight_VD.T, out=logits_RV)
            logits_RV[:, n_vocab:] = -math.inf  # padding rows: probability and gradient exactly 0
            max_R, sum_R = exp_rows(logits_RV, e_RV)
            target_logits_R = logits_RV.gather(1, targets_R[:, None]).squeeze(1)
            losses_R.copy_((max_R + sum_R.log() - target_logits_R) * real_R)
            if needs_gradient:
                scale_R1 = (real_R / sum_R)[:, None]
                torch.mul(e_RV @ narrow_weight_VD, scale_R1, out=dx_RD)
                dw_DV += torch.mm((x_RD * scale_R1).to(dtype).T, e_RV, out=dw_tile_DV)
        if needs_gradient:
            real_P1 = real_P[:, None]
            dw_VD = dw_DV.T.contiguous().index_add_(0, targets_P, (-x_PD * real_P1).to(wide))
            dx_PD -= weight_VD[targets_P] * real_P1
            ctx.save_for_backward(dx_PD.to(x_PD.dtype), dw_VD.to(weight_VD.dtype))
        return losses_P.sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_loss: Tensor) -> tuple[Tensor | None, ...]:
        dx_PD, dw_VD = ctx.saved_tensors
        return dx_PD * d_loss, dw_VD * d_loss, None, None, None, None, None


def exp_rows(logits_RV: Tensor, out_RV: Tensor) -> tuple[Tensor, Tensor]:
    """Write exp(logits - max of the row) to `out_RV`; return max and sum by row. Compiled, it is one fused pass."""
    wide_RV = logits_RV.to(torch.promote_types(logits_RV.dtype, torch.float32))
    max_R1 = wide_RV.amax(1, keepdim=True)
    e_RV = (wide_RV - max_R1).exp()
    out_RV.copy_(e_RV)
    return max_R1.squeeze(1), e_RV.sum(1)
