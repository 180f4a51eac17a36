"""Time the cross-entropy of the language-model head, full and chunked, eager and compiled: `python -m bench.head`.

Shapes A and B are 4,096 positions of hidden size 32 and 2,048 of hidden size 384 with GPT-2's vocabulary; `bytes` is B
with a vocabulary of 257. Forward and backward, each implementation in turn.
"""

from __future__ import annotations

import statistics
import time

import torch
from torch import Tensor

import distgpt  # noqa: F401  # sets torch's allocator before torch loads
from distgpt.models import cross_entropy
from distgpt.models.cross_entropy import ChunkedCrossEntropy, CrossEntropy, full_cross_entropy

SHAPES = {"A": (4096, 32, 50257), "B": (2048, 384, 50257), "bytes": (2048, 384, 257)}
"""Positions, hidden size and vocabulary."""


def make_implementations() -> dict[str, CrossEntropy]:
    """Each implementation by name."""
    return {
        "full": full_cross_entropy,
        "chunked": ChunkedCrossEntropy(),
        "full compiled": torch.compile(full_cross_entropy, dynamic=False),
        "chunked compiled": ChunkedCrossEntropy(compiled=True),
    }


def step_seconds(
    loss_function: CrossEntropy, x_PD: Tensor, weight_VD: Tensor, targets_P: Tensor, n_vocab: int, bf16: bool
) -> float:
    """The time of one forward and backward."""
    started_at = time.perf_counter()
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        loss = loss_function(x_PD, weight_VD, targets_P, n_vocab)
    (loss / len(x_PD)).backward()  # type: ignore[no-untyped-call]
    x_PD.grad = weight_VD.grad = None
    return time.perf_counter() - started_at


def main(rounds: int = 7) -> None:
    """Print the medians of each shape."""
    cross_entropy.MIN_CHUNKED_LOGITS = 0  # always in chunks, also where all logits at once would be chosen
    for shape_name, (num_positions, hidden_size, n_vocab) in SHAPES.items():
        x_PD = torch.randn(num_positions, hidden_size).requires_grad_()
        weight_VD = (0.02 * torch.randn(-(-n_vocab // 64) * 64, hidden_size)).requires_grad_()
        targets_P = torch.randint(n_vocab, (num_positions,))
        for bf16 in (True, False):
            torch.compiler.reset()
            implementations = make_implementations()
            times: dict[str, list[float]] = {name: [] for name in implementations}
            for _ in range(rounds):
                for name, function in implementations.items():
                    times[name].append(step_seconds(function, x_PD, weight_VD, targets_P, n_vocab, bf16))
            medians = [f"{name} {statistics.median(t[2:]) * 1e3:.1f} ms" for name, t in times.items()]
            print(f"{shape_name} {'bf16' if bf16 else 'fp32'}: {', '.join(medians)}", flush=True)


if __name__ == "__main__":
    main()
