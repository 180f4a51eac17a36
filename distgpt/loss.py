"""Hidden states to the summed loss of their next tokens, plainly or without ever holding all the logits."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

ExpRows = Callable[[Tensor, Tensor, Tensor], Tensor]

IGNORED = -100
"""Target id of a position that has no target (padding): it adds nothing to the loss or to a gradient."""

TILE_BYTES = 100 * 2**20
"""Room for one tile of logits (1,024 positions of GPT-2's vocabulary in bf16). Smaller tiles add up the weight's
gradient too often; larger ones gain nothing (bench/README.md)."""

FEW_LOGITS = 2**21
"""So many are as fast whole as in tiles, or faster (bench/README.md)."""

LARGE = 2.0**96
"""exp of a loss of 66 nats; from there on, products with exponentials might overflow."""

NARROW = 64
"""Widths below it have the weight's gradient added up column by column: matmuls are faster so (bench/README.md)."""


def exp_rows(logits_RV: Tensor, shift_R: Tensor, out_RV: Tensor) -> Tensor:
    """Write exp(logits - shift of the row) to `out_RV`; return its sum by row. Compiled, it is one fused pass."""
    e_RV = (logits_RV.to(shift_R.dtype) - shift_R[:, None]).exp()
    out_RV.copy_(e_RV)
    return e_RV.sum(1)


class Tiles:
    """The room in which `tiled_loss` works, kept from call to call: fresh memory of that size costs page faults."""

    def __init__(self, exp_rows: ExpRows = exp_rows) -> None:
        self.exp_rows = exp_rows
        self.kept: tuple[Tensor, Tensor, Tensor] | None = None

    def room(self, R: int, V: int, D: int, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Logits RV, their exponentials RV and a tile's share of the weight's gradient VD, in the type of `like`."""
        if self.kept is None or self.kept[0].shape != (R, V) or self.kept[0].dtype != like.dtype:
            self.kept = None  # before the next is made
            self.kept = like.new_empty(R, V), like.new_empty(R, V), weight_like(like, V, D, like.dtype)
        return self.kept


def plain_loss(x_PD: Tensor, weight_VD: Tensor, targets_P: Tensor, n_vocab: int) -> Tensor:
    """The sum over positions of -log softmax(x weight^T)[target] in nats (fp32 scalar), by autograd."""
    padding_V = torch.where(torch.arange(len(weight_VD), device=x_PD.device) < n_vocab, 0.0, -math.inf).to(x_PD.dtype)
    logits_PV = F.linear(x_PD, weight_VD, padding_V)  # all rows: matrix units like their number; padding's share is 0
    wide_PV = logits_PV.to(torch.promote_types(logits_PV.dtype, torch.float32))
    return F.cross_entropy(wide_PV, targets_P, ignore_index=IGNORED, reduction="sum")


def tiled_loss(x_PD: Tensor, weight_VD: Tensor, targets_P: Tensor, n_vocab: int, tiles: Tiles) -> Tensor:
    """`plain_loss`, by itself for few logits, else a tile of positions at a time with both gradients formed at once.

    Memory is one tile of logits instead of P x V; time is three matmuls and one exponential a logit. Computes in
    the autocast dtype where autocast is on; sums and the weight's gradient are kept in fp32 (fp64 for fp64 input).
    """
    if len(x_PD) * len(weight_VD) < FEW_LOGITS:
        return plain_loss(x_PD, weight_VD, targets_P, n_vocab)
    device_type = x_PD.device.type
    dtype = torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else x_PD.dtype
    loss: Tensor = TiledLoss.apply(  # type: ignore[no-untyped-call]
        x_PD, weight_VD, targets_P, n_vocab, dtype, torch.is_grad_enabled(), tiles
    )
    return loss


class TiledLoss(torch.autograd.Function):
    """Gradients of a summed softmax cross-entropy, with e = exp(logits - the target's), s = sum(e), onehot = target's
    column: the loss is log s, and d loss / d logits = e / s - onehot. The division is folded into the thin operands,
    so that e is read as it is: dx = (e W) / s - W[target]   and   dW = e^T (x / s) - scatter(x to the target's row).
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
        tiles: Tiles,
    ) -> Tensor:
        (P, D), V = x_PD.shape, len(weight_VD)
        wide = torch.promote_types(x_PD.dtype, torch.float32)
        R = rows_of_a_tile(P, V * dtype.itemsize)
        narrow_x_PD, narrow_weight_VD = x_PD.to(dtype), weight_VD.to(dtype)
        real_P, targets_P = targets_P != IGNORED, targets_P.clamp(min=0)
        logits_RV, e_RV, dw_tile_VD = tiles.room(R, V, D, like=narrow_x_PD)
        dx_PD, dw_VD = torch.empty_like(x_PD, dtype=wide), weight_like(x_PD, V, D, wide).zero_()
        losses_P = x_PD.new_empty(P, dtype=wide)
        for tile in zip(*(torch.split(t, R) for t in (narrow_x_PD, targets_P, real_P, losses_P, dx_PD)), strict=True):
            x_RD, targets_R, real_R, losses_R, dx_RD = tile
            logits_RV, e_RV = logits_RV[: len(x_RD)], e_RV[: len(x_RD)]
            torch.mm(x_RD, narrow_weight_VD.T, out=logits_RV)
            logits_RV[:, n_vocab:] = -math.inf  # padding rows: probability and gradient exactly 0
            target_logits_R = shift_R = logits_RV.gather(1, targets_R[:, None]).squeeze(1).to(wide)
            sum_R = tiles.exp_rows(logits_RV, shift_R, e_RV)
            if not (sum_R < LARGE).all():  # a target that far below the largest logit: start from that
                shift_R = logits_RV.amax(1).to(wide)
                sum_R = tiles.exp_rows(logits_RV, shift_R, e_RV)
            losses_R.copy_((sum_R.log() + (shift_R - target_logits_R)) * real_R)
            if needs_gradient:
                scale_R1 = (real_R / sum_R)[:, None]
                torch.mul(e_RV @ narrow_weight_VD, scale_R1, out=dx_RD)
                dw_VD += torch.mm(e_RV.T, (x_RD * scale_R1).to(dtype), out=dw_tile_VD)
        if needs_gradient:
            real_P1 = real_P[:, None]
            dw_VD = dw_VD.contiguous().index_add_(0, targets_P, (-x_PD * real_P1).to(wide))
            dx_PD -= weight_VD[targets_P] * real_P1
            ctx.save_for_backward(dx_PD.to(x_PD.dtype), dw_VD.to(weight_VD.dtype))
        return losses_P.sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_loss: Tensor) -> tuple[Tensor | None, ...]:
        dx_PD, dw_VD = ctx.saved_tensors
        return dx_PD.mul_(d_loss), dw_VD.mul_(d_loss), None, None, None, None, None


def rows_of_a_tile(positions: int, row_bytes: int) -> int:
    """Positions in a tile: as many as have room, in tiles of about the same size."""
    tiles = math.ceil(positions * row_bytes / TILE_BYTES)
    return min(positions, math.ceil(positions / tiles / 64) * 64)


def weight_like(like: Tensor, V: int, D: int, dtype: torch.dtype) -> Tensor:
    """Room for the weight's gradient VD, by column in memory where it is narrow."""
    return like.new_empty(D, V, dtype=dtype).T if D < NARROW else like.new_empty(V, D, dtype=dtype)
