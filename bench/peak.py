"""Print the speed of large matrix products on this machine, in TFLOP/s by precision, as JSON: `python -m bench.peak`.

2048^3 on a CPU, 8192^3 on a GPU; the median of up to ten.
"""

from __future__ import annotations

import json
import statistics
import time

import torch


def matmul_tflops(dtype: torch.dtype, device: str) -> float:
    """Of a product of square matrices of this dtype."""
    n = 8192 if device == "cuda" else 2048
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    times: list[float] = []
    while len(times) < 3 or (len(times) < 12 and sum(times) < 2):
        started_at = time.perf_counter()
        torch.mm(a, b)
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started_at)
    return 2 * n**3 / statistics.median(times[2:]) / 1e12


if __name__ == "__main__":
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16}
    print(json.dumps({name: round(matmul_tflops(dtype, device), 4) for name, dtype in dtypes.items()}))
