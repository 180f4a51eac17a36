"""Time the loss head, plain against tiled, compiled or not, in turn: `python -m bench.head`.

Shapes A and B are 4,096 positions of width 32 and 2,048 of width 384 with GPT-2's vocabulary, `bytes` is B with one of
257; forward and backward.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

import distgpt  # noqa: F401  # sets torch's allocator before torch loads
from distgpt import loss as losses
from distgpt.loss import Tiles, exp_rows, plain_loss, tiled_loss

SHAPES = {"A": (4096, 32, 50257), "B": (2048, 384, 50257), "bytes": (2048, 384, 257)}
Loss = Callable[[Tensor, Tensor, Tensor, int], Tensor]


def heads() -> dict[str, Loss]:
    """The contestants by name."""
    return {
        "plain": plain_loss,
        "tiled": functools.partial(tiled_loss, tiles=Tiles()),
        "plain compiled": torch.compile(plain_loss, dynamic=False),
        "tiled compiled": functools.partial(tiled_loss, tiles=Tiles(torch.compile(exp_rows, dynamic=False))),
    }


def seconds(loss: Loss, x_PD: Tensor, weight_VD: Tensor, targets_P: Tensor, n_vocab: int, bf16: bool) -> float:
    """One forward and backward."""
    started_at = time.perf_counter()
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        found = loss(x_PD, weight_VD, targets_P, n_vocab)
    (found / len(x_PD)).backward()  # type: ignore[no-untyped-call]
    x_PD.grad = weight_VD.grad = None
    return time.perf_counter() - started_at


def main(rounds: int = 7) -> None:
    """Print medians, shape by shape."""
    losses.FEW_LOGITS = 0  # tiles even where plain logits would be taken
    for shape, (positions, width, n_vocab) in SHAPES.items():
        x_PD = torch.randn(positions, width).requires_grad_()
        weight_VD = (0.02 * torch.randn(-(-n_vocab // 64) * 64, width)).requires_grad_()
        targets_P = torch.randint(n_vocab, (positions,))
        for bf16 in (True, False):
            torch.compiler.reset()
            contestants = heads()
            times: dict[str, list[float]] = {name: [] for name in contestants}
            for _ in range(rounds):
                for name, loss in contestants.items():
                    times[name].append(seconds(loss, x_PD, weight_VD, targets_P, n_vocab, bf16))
            medians = [f"{name} {statistics.median(found[2:]) * 1e3:.1f} ms" for name, found in times.items()]
            print(f"{shape} {'bf16' if bf16 else 'fp32'}: {', '.join(medians)}", flush=True)


if __name__ == "__main__":
    main()
