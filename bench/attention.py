"""Time causal attention in bf16 on this CPU, each way that distgpt goes, in turn: `python -m bench.attention`.

Compiled, forward and backward: fused (`F.scaled_dot_product_attention`), fused in fp32, and by matmuls.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

import distgpt  # noqa: F401  # sets torch's allocator before torch loads
from distgpt.model import attend_by_matmuls

SHAPES = {"A": (32, 2, 128, 16), "B": (8, 6, 256, 64)}
SHAPES |= {f"T={T} H={H}": (2048 // T, 6, T, H) for T in (128, 256, 512, 1024) for H in (16, 32, 64)}
"""Sequences, heads, positions and head size."""

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def fused(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """In the type that they have."""
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def fused_fp32(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """As distgpt does for narrow heads."""
    return fused(q.float(), k.float(), v.float()).bfloat16()


def by_matmuls(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """As distgpt does for wider heads, as long as sequences are short."""
    return attend_by_matmuls(q, k, v, 0.0)


def seconds(attend: Attend, qkv: Tensor) -> float:
    """One forward and backward."""
    started_at = time.perf_counter()
    attended = attend(*qkv.unbind())
    attended.backward(torch.ones_like(attended))  # type: ignore[no-untyped-call]
    qkv.grad = None
    return time.perf_counter() - started_at


def main(rounds: int = 12) -> None:
    """Print medians, shape by shape."""
    for name, shape in SHAPES.items():
        torch.compiler.reset()
        ways = {way.__name__: torch.compile(way, dynamic=False) for way in (fused, fused_fp32, by_matmuls)}
        qkv = torch.randn(3, *shape).bfloat16().requires_grad_()
        times: dict[str, list[float]] = {way: [] for way in ways}
        for _ in range(rounds):
            for way, attend in ways.items():
                times[way].append(seconds(attend, qkv))
        print(f"{name}: {', '.join(f'{way} {statistics.median(t[3:]) * 1e3:.1f} ms' for way, t in times.items())}")


if __name__ == "__main__":
    main()
