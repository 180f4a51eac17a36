"""Time causal attention in bf16 on this CPU, each implementation in turn: `python -m bench.attention`.

Compiled, forward and backward: fused (`F.scaled_dot_product_attention`), fused in fp32, and by matmuls.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

import distgpt  # noqa: F401  # sets torch's allocator before torch loads
from distgpt.models.attention_kernels import matmul_attention, sdpa

SHAPES = {"A": (32, 2, 128, 16), "B": (8, 6, 256, 64)}
SHAPES |= {f"T={T} H={H}": (2048 // T, 6, T, H) for T in (128, 256, 512, 1024) for H in (16, 32, 64)}
"""Sequences, heads, positions and head size."""

AttentionFunction = Callable[[Tensor, Tensor, Tensor], Tensor]


def fused(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """In the dtype of the inputs."""
    return sdpa(q, k, v, None, 0.0)


def fused_fp32(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """What distgpt uses for small heads."""
    return fused(q.float(), k.float(), v.float()).bfloat16()


def by_matmuls(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """What distgpt uses for larger heads and short sequences."""
    return matmul_attention(q, k, v, None, 0.0)


def step_seconds(attend: AttentionFunction, qkv: Tensor) -> float:
    """The time of one forward and backward."""
    started_at = time.perf_counter()
    output = attend(*qkv.unbind())
    output.backward(torch.ones_like(output))  # type: ignore[no-untyped-call]
    qkv.grad = None
    return time.perf_counter() - started_at


def main(rounds: int = 12) -> None:
    """Print the medians of each shape."""
    for shape_name, shape in SHAPES.items():
        torch.compiler.reset()
        implementations = {
            function.__name__: torch.compile(function, dynamic=False) for function in (fused, fused_fp32, by_matmuls)
        }
        qkv = torch.randn(3, *shape).bfloat16().requires_grad_()
        times: dict[str, list[float]] = {name: [] for name in implementations}
        for _ in range(rounds):
            for name, attend in implementations.items():
                times[name].append(step_seconds(attend, qkv))
        medians = [f"{name} {statistics.median(t[3:]) * 1e3:.1f} ms" for name, t in times.items()]
        print(f"{shape_name}: {', '.join(medians)}")


if __name__ == "__main__":
    main()
