"""Which implementation of attention, GELU and cross-entropy a model runs: chosen by name before it is built."""

from __future__ import annotations

from dataclasses import dataclass

MIN_SDPA_BF16_HEAD_SIZE = 32
"""On the CPU, SDPA with smaller heads is faster in fp32 than in bf16 (bench/README.md)."""

MAX_MATMUL_ATTENTION_SEQ_LEN = 512
"""On the CPU in bf16, compiled matmul attention is faster than SDPA up to this length (bench/README.md)."""


@dataclass(frozen=True)
class Kernels:
    """Names of implementations. All compute the same function; they differ in speed, memory and rounding."""

    attention: str = "sdpa"
    """A key of `attention_kernels.ATTENTION`."""
    gelu: str = "tanh"
    """A key of `gpt2.GELU`."""
    cross_entropy: str = "full"
    """A key of `cross_entropy.CROSS_ENTROPY`."""

    def describe(self) -> str:
        """The names that matter to users, for the run header."""
        return f"attention {self.attention}, cross-entropy {self.cross_entropy}"


def resolve_kernels(
    device_type: str, precision: str, compiled: bool, blocks_compiled: bool, head_size: int, seq_len: int
) -> Kernels:
    """The fastest implementations for a device, a precision, and what is compiled.

    `blocks_compiled`: the blocks are compiled. `compiled`: the chunked cross-entropy is.
    """
    if device_type != "cpu":
        return Kernels(gelu="sigmoid" if blocks_compiled else "tanh")
    attention = "sdpa"
    if precision == "bf16" and head_size < MIN_SDPA_BF16_HEAD_SIZE:
        attention = "sdpa-fp32"
    elif precision == "bf16" and blocks_compiled and seq_len <= MAX_MATMUL_ATTENTION_SEQ_LEN:
        attention = "matmul"
    cross_entropy = "chunked" if precision == "bf16" else "full"
    if compiled:
        cross_entropy = "chunked-compiled"
    return Kernels(attention, "sigmoid" if blocks_compiled else "tanh", cross_entropy)
