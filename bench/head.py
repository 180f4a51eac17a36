"""Time the loss head, plain against tiled, both compiled, in turn: `python bench/head.py`.

Shapes A and B are 4,096 positions of width 32 and 2,048 of width 384, with GPT-2's vocabulary; forward and backward.
"""

from __future__ import annotations

import statistics
import time

import torch
from torch import Tensor

import distgpt  # noqa: F401  # sets torch's allocator before torch loads
from distgpt.loss import Tiles, exp_rows, plain_loss, tiled_loss

N_VOCAB, ROWS = 50257, 50304


def seconds(kind: str, inputs: tuple[Tensor, Tensor, Tensor], compiled: dict[str, object], bf16: bool) -> float:
    """One forward and backward."""
    x_PD, weight_VD, targets_P = inputs
    started_at = time.perf_counter()
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        if kind == "plain":
            loss = compiled["plain"](x_PD, weight_VD, targets_P, N_VOCAB)  # type: ignore[operator]
        else:
            loss = tiled_loss(x_PD, weight_VD, targets_P, N_VOCAB, compiled["tiled"])  # type: ignore[arg-type]
    loss.backward()
    x_PD.grad = weight_VD.grad = None
    return time.perf_counter() - started_at


def main(rounds: int = 5) -> None:
    """Print medians and their ratio, shape by shape."""
    for shape, (positions, width) in {"A": (4096, 32), "B": (2048, 384)}.items():
        x_PD = torch.randn(positions, width).requires_grad_()
        weight_VD = (0.02 * torch.randn(ROWS, width)).requires_grad_()
        inputs = x_PD, weight_VD, torch.randint(N_VOCAB, (positions,))
        for bf16 in (True, False):
            torch.compiler.reset()
            compiled: dict[str, object] = {
                "plain": torch.compile(plain_loss, dynamic=False),
                "tiled": Tiles(torch.compile(exp_rows, dynamic=False)),
            }
            times: dict[str, list[float]] = {"plain": [], "tiled": []}
            for _ in range(rounds + 2):
                for kind, found in times.items():
                    found.append(seconds(kind, inputs, compiled, bf16))
            plain, tiled = (statistics.median(found[2:]) for found in times.values())
            precision = "bf16" if bf16 else "fp32"
            print(f"{shape} {precision}: plain {plain * 1e3:.0f} ms, tiled {tiled * 1e3:.0f} ms, {plain / tiled:.2f}x")


if __name__ == "__main__":
    main()
