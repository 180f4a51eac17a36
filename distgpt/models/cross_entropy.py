"""The LM head: hidden states to logits, or to the summed cross-entropy of targets, at once or in chunks of positions.

`P` positions, `R` positions of one chunk, `V` vocabulary rows (padding included), `D` hidden size.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

CrossEntropy = Callable[[Tensor, Tensor, Tensor, int], Tensor]
ExpAndRowSum = Callable[[Tensor, Tensor, Tensor], Tensor]

IGNORE_INDEX = -100
"""Target id of a position without a target (padding): it adds nothing to the loss or to a gradient."""

CHUNK_BYTES = 100 * 2**20
"""Size of a chunk of logits (1,024 positions of GPT-2's vocabulary in bf16). Smaller chunks add to the weight's
gradient too often; larger ones gain nothing (bench/README.md)."""

MIN_CHUNKED_LOGITS = 2**21
"""Fewer logits are at least as fast all at once (bench/README.md)."""

MAX_ROW_SUM = 2.0**96
"""exp of a loss of 66 nats. Products with larger exponentials might overflow."""

MIN_ROW_MAJOR_WIDTH = 64
"""Below this hidden size the weight's gradient is stored column-major, for faster matmuls (bench/README.md)."""


def full_cross_entropy(x_PD: Tensor, weight_VD: Tensor, targets_P: Tensor, n_vocab: int) -> Tensor:
    """The sum over positions of -log softmax(x weight^T)[target] in nats (fp32 scalar), through autograd.

    The matmul takes all V rows, whose number suits matrix units; a bias of -inf gives padding rows probability 0.
    """
    is_padding_V = torch.arange(len(weight_VD), device=x_PD.device) >= n_vocab
    bias_V = torch.where(is_padding_V, -math.inf, 0.0).to(x_PD.dtype)
    logits_PV = F.linear(x_PD, weight_VD, bias_V)
    logits_PV = logits_PV.to(torch.promote_types(logits_PV.dtype, torch.float32))
    return F.cross_entropy(logits_PV, targets_P, ignore_index=IGNORE_INDEX, reduction="sum")


def exp_and_row_sum(logits_RV: Tensor, shift_R: Tensor, out_RV: Tensor) -> Tensor:
    """Write exp(logits - the row's shift) to `out_RV` and return the sum of each row. Compiled, one fused pass."""
    exp_RV = (logits_RV.to(shift_R.dtype) - shift_R[:, None]).exp()
    out_RV.copy_(exp_RV)
    return exp_RV.sum(1)


class ChunkedCrossEntropy:
    """`full_cross_entropy` in chunks of positions, computing gradients during forward (a fused linear cross-entropy).

    Instead of P x V logits, memory holds two R x V buffers and two V x D gradients of the weight. Time is three matmuls
    and one exponential per logit. Computes in the autocast dtype if autocast is on. Sums and the weight's gradient are
    kept in fp32 (fp64 for fp64 input). Buffers are kept between calls, since fresh memory costs page faults.
    """

    def __init__(self, compiled: bool = False) -> None:
        self.exp_and_row_sum: ExpAndRowSum = exp_and_row_sum
        if compiled:
            self.exp_and_row_sum = torch.compile(exp_and_row_sum, dynamic=False)
        self._buffers: tuple[Tensor, Tensor, Tensor] | None = None

    def __call__(self, x_PD: Tensor, weight_VD: Tensor, targets_P: Tensor, n_vocab: int) -> Tensor:
        """The summed loss (fp32 scalar)."""
        if len(x_PD) * len(weight_VD) < MIN_CHUNKED_LOGITS:
            return full_cross_entropy(x_PD, weight_VD, targets_P, n_vocab)
        device_type = x_PD.device.type
        dtype = torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else x_PD.dtype
        loss: Tensor = _ChunkedCrossEntropyFunction.apply(  # type: ignore[no-untyped-call]
            x_PD, weight_VD, targets_P, n_vocab, dtype, torch.is_grad_enabled(), self
        )
        return loss

    def buffers(self, R: int, V: int, D: int, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Uninitialized logits RV, exponentials RV and a chunk's weight gradient VD, in the dtype of `like`."""
        buffers = self._buffers
        if buffers is None or buffers[0].shape != (R, V) or buffers[0].dtype != like.dtype:
            self._buffers = None  # frees the old buffers first
            self._buffers = like.new_empty(R, V), like.new_empty(R, V), _empty_weight_grad(like, V, D, like.dtype)
            return self._buffers
        return buffers


class _ChunkedCrossEntropyFunction(torch.autograd.Function):
    """Gradients of a summed softmax cross-entropy.

    With e = exp(logits - the target's logit), s = sum(e) over the vocabulary, and onehot the target's column, the loss
    is log s and d loss / d logits = e / s - onehot. The division is folded into the small operands, so that e is used
    as it is: dx = (e W) / s - W[target] and dW = e^T (x / s) - scatter(x to the target's row).
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
        workspace: ChunkedCrossEntropy,
    ) -> Tensor:
        (P, D), V = x_PD.shape, len(weight_VD)
        sum_dtype = torch.promote_types(x_PD.dtype, torch.float32)
        R = _rows_per_chunk(P, V * dtype.itemsize)
        matmul_x_PD, matmul_weight_VD = x_PD.to(dtype), weight_VD.to(dtype)
        has_target_P, targets_P = targets_P != IGNORE_INDEX, targets_P.clamp(min=0)
        logits_RV, exp_RV, chunk_dw_VD = workspace.buffers(R, V, D, like=matmul_x_PD)
        dx_PD = torch.empty_like(x_PD, dtype=sum_dtype)
        if needs_gradient:
            dw_VD = _empty_weight_grad(x_PD, V, D, sum_dtype).zero_()
        losses_P = x_PD.new_empty(P, dtype=sum_dtype)
        per_position = (matmul_x_PD, targets_P, has_target_P, losses_P, dx_PD)
        for chunk in zip(*(torch.split(tensor, R) for tensor in per_position), strict=True):
            x_RD, targets_R, has_target_R, losses_R, dx_RD = chunk
            logits_RV, exp_RV = logits_RV[: len(x_RD)], exp_RV[: len(x_RD)]  # only the last chunk may be smaller
            torch.mm(x_RD, matmul_weight_VD.T, out=logits_RV)
            logits_RV[:, n_vocab:] = -math.inf  # padding rows: probability and gradient exactly 0
            target_logits_R = shift_R = logits_RV.gather(1, targets_R[:, None]).squeeze(1).to(sum_dtype)
            sum_R = workspace.exp_and_row_sum(logits_RV, shift_R, exp_RV)
            if not (sum_R < MAX_ROW_SUM).all():  # a target far below the largest logit: shift by the largest instead
                shift_R = logits_RV.amax(1).to(sum_dtype)
                sum_R = workspace.exp_and_row_sum(logits_RV, shift_R, exp_RV)
            losses_R.copy_((sum_R.log() + (shift_R - target_logits_R)) * has_target_R)
            if needs_gradient:
                scale_R1 = (has_target_R / sum_R)[:, None]
                torch.mul(exp_RV @ matmul_weight_VD, scale_R1, out=dx_RD)
                dw_VD += torch.mm(exp_RV.T, (x_RD * scale_R1).to(dtype), out=chunk_dw_VD)
        if needs_gradient:
            has_target_P1 = has_target_P[:, None]
            dw_VD = dw_VD.contiguous().index_add_(0, targets_P, (-x_PD * has_target_P1).to(sum_dtype))
            dx_PD -= weight_VD[targets_P] * has_target_P1
            ctx.save_for_backward(dx_PD.to(x_PD.dtype), dw_VD.to(weight_VD.dtype))
        return losses_P.sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_loss: Tensor) -> tuple[Tensor | None, ...]:
        dx_PD, dw_VD = ctx.saved_tensors
        return dx_PD.mul_(d_loss), dw_VD.mul_(d_loss), None, None, None, None, None


def _rows_per_chunk(num_positions: int, row_bytes: int) -> int:
    """Positions per chunk: about as many as CHUNK_BYTES holds, in chunks of equal size."""
    num_chunks = math.ceil(num_positions * row_bytes / CHUNK_BYTES)
    return min(num_positions, math.ceil(num_positions / num_chunks / 64) * 64)


def _empty_weight_grad(like: Tensor, V: int, D: int, dtype: torch.dtype) -> Tensor:
    """An uninitialized VD gradient, column-major where the hidden size is small."""
    if D < MIN_ROW_MAJOR_WIDTH:
        return like.new_empty(D, V, dtype=dtype).T
    return like.new_empty(V, D, dtype=dtype)


CROSS_ENTROPY: dict[str, Callable[[], CrossEntropy]] = {
    "full": lambda: full_cross_entropy,
    "chunked": ChunkedCrossEntropy,
    "chunked-compiled": lambda: ChunkedCrossEntropy(compiled=True),
}
"""Makes each implementation, by name."""


class LMHead(nn.Module):
    """Hidden states to logits or loss. It owns no parameter: its weight is the token embedding's."""

    def __init__(self, n_vocab: int, cross_entropy: str) -> None:
        super().__init__()
        self.n_vocab = n_vocab
        self.cross_entropy = CROSS_ENTROPY[cross_entropy]()

    def forward(self, x_BTD: Tensor, weight_VD: Tensor, targets_BT: Tensor | None = None) -> Tensor:
        """Logits BTV; with `targets_BT`, the sum of the token losses in nats instead (fp32 scalar)."""
        if targets_BT is None:
            return F.linear(x_BTD, weight_VD[: self.n_vocab])
        return self.cross_entropy(x_BTD.flatten(0, 1), weight_VD, targets_BT.flatten(), self.n_vocab)
