"""What a training step needs under each parallel layout: memory and communication, estimated in closed form.

Imports no torch. `python -m distgpt.config CONFIG --estimate` prints the table.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from functools import cached_property

from distgpt.data.sampler import BatchPlan
from distgpt.distributed.layout import ParallelLayout
from distgpt.models.architectures import ModelConfig

FP32_BYTES = 4
"""Bytes of an fp32 number. Weights, gradients and optimizer state are fp32 in every precision."""

USABLE_FRACTION = 0.9
"""Usable share of a device's memory. The driver, libraries and fragmentation take the rest."""


@dataclass(frozen=True)
class StepWorkload:
    """What one update computes, whatever the layout."""

    model: ModelConfig
    n_vocab: int
    batch: BatchPlan
    seq_len: int
    precision: str

    @property
    def matmul_bytes(self) -> int:
        """Size of a number in a matmul."""
        return 2 if self.precision == "bf16" else FP32_BYTES

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every parameter."""
        return self.model.parameter_shapes(self.n_vocab)

    @cached_property
    def block_numel(self) -> int:
        """Parameters of one layer."""
        return sum(math.prod(shape) for name, shape in self.shapes.items() if name.startswith("blocks.0."))

    @cached_property
    def non_block_numel(self) -> int:
        """Parameters outside the layers, padding rows of the vocabulary included."""
        return sum(math.prod(shape) for name, shape in self.shapes.items() if not name.startswith("blocks."))

    def sharded_numel(self, shard_size: int = 1) -> int:
        """Parameters in the largest shard when rows are divided among `shard_size` ranks, padding included."""
        return sum(math.ceil(shape[0] / shard_size) * math.prod(shape[1:]) for shape in self.shapes.values())


def estimate_memory(workload: StepWorkload, layout: ParallelLayout) -> dict[str, int]:
    """Bytes by purpose on the rank that needs most, at the peak of a step: the end of forward.

    Counts eager execution with all logits at once; compilation and chunked cross-entropy need less. Dropout needs more,
    and so does attention within documents (by about an eighth of the activations).
    """
    model, batch = workload.model, workload.batch
    block, non_block = workload.block_numel, workload.non_block_numel
    all_numel, rank_numel = workload.sharded_numel(), workload.sharded_numel(layout.shard_size)
    gradients = FP32_BYTES * rank_numel
    if not layout.is_sharded:
        # bf16 copies that autocast makes, which are kept for backward unless backward recomputes them.
        cast = all_numel if layout.activation_checkpointing == "none" else non_block
        copies = 2 * cast if workload.precision == "bf16" else 0
    else:
        # One block computes while the next is gathered; embeddings and the final norm stay unsharded, in fp32.
        num_blocks = min(2, model.n_layer) if layout.reshard_after_forward else model.n_layer
        copies = FP32_BYTES * non_block + workload.matmul_bytes * num_blocks * block
        if layout.sync_each_micro_step or batch.micro_steps == 1:
            gradients += FP32_BYTES * (non_block + min(2, model.n_layer) * block)
        else:
            gradients += FP32_BYTES * all_numel

    def layer_bytes(recomputation: str) -> int:
        fp32_numbers, matmul_numbers = model.activations_per_token(recomputation)
        return FP32_BYTES * fp32_numbers + workload.matmul_bytes * matmul_numbers

    activations = model.n_layer * layer_bytes(layout.activation_checkpointing)
    if layout.activation_checkpointing != "none":  # one layer is recomputed at a time
        activations += layer_bytes("none")
    vocab_rows, _ = embedding_shape = workload.shapes["token_embedding.weight"]
    logits = (workload.matmul_bytes + 3 * FP32_BYTES) * vocab_rows  # logits; in fp32 their copy, softmax and gradient
    embedding_gradient = FP32_BYTES * math.prod(embedding_shape)  # dense, before it is added to the head's
    tokens = batch.largest_micro_batch * workload.seq_len
    return {
        "weights": FP32_BYTES * rank_numel,
        "optimizer state": 2 * FP32_BYTES * rank_numel,
        "gradients": gradients + embedding_gradient,
        "cast or gathered weights": copies,
        "activations": tokens * activations,
        "logits": tokens * logits,
    }


def fits_in_memory(workload: StepWorkload, layout: ParallelLayout, device_bytes: float) -> bool:
    """Whether the estimate fits the usable share of a rank's memory."""
    return sum(estimate_memory(workload, layout).values()) <= USABLE_FRACTION * device_bytes


def resolve_grad_sync(
    workload: StepWorkload, layout: ParallelLayout, grad_sync: str, device_bytes: float
) -> ParallelLayout:
    """The layout with `parallel.grad_sync` resolved: `auto` reduces on the last micro-step where memory allows.

    Gradients reduced in bf16 are reduced after each micro-step, since FSDP would otherwise accumulate them in bf16.
    """
    last = dataclasses.replace(layout, sync_each_micro_step=False)
    each = grad_sync == "each" or layout.reduce_dtype == "bf16"
    each = each or (grad_sync == "auto" and not fits_in_memory(workload, last, device_bytes))
    return dataclasses.replace(layout, sync_each_micro_step=each and layout.is_sharded)


def largest_batch(workload: StepWorkload, layout: ParallelLayout, grad_sync: str, device_bytes: float) -> int:
    """The largest batch_size that fits when every micro-batch is full; 0 where none does."""
    dp_size, micro_steps = workload.batch.dp_size, workload.batch.micro_steps
    largest = 0
    for bit in reversed(range(20)):
        size = largest + 2**bit
        full = dataclasses.replace(workload, batch=BatchPlan(size * dp_size * micro_steps, size, dp_size))
        if fits_in_memory(full, resolve_grad_sync(full, layout, grad_sync, device_bytes), device_bytes):
            largest = size
    return largest


def comm_bytes(workload: StepWorkload, layout: ParallelLayout) -> int:
    """Bytes that one rank sends in one step, with ring algorithms (Thakur, Rabenseifner & Gropp 2005).

    An all-gather or reduce-scatter of n bytes over r ranks sends (r - 1) / r n, an all-reduce twice that.
    """

    def ring(num_ranks: int, num_bytes: float) -> float:
        return (num_ranks - 1) / num_ranks * num_bytes

    all_numel, micro_steps = workload.sharded_numel(), workload.batch.micro_steps
    gradient_bytes = all_numel * (2 if layout.reduce_dtype == "bf16" else FP32_BYTES)
    if not layout.is_sharded:
        return round(2 * ring(layout.world_size, gradient_bytes))
    block_bytes = workload.matmul_bytes * (all_numel - workload.non_block_numel)
    passes, gathers_per_pass = (micro_steps, 2) if layout.reshard_after_forward else (1, 1)
    gathered_bytes = gathers_per_pass * block_bytes + FP32_BYTES * workload.non_block_numel
    gathers = passes * ring(layout.shard_size, gathered_bytes)
    reductions = (micro_steps if layout.sync_each_micro_step else 1) * ring(layout.shard_size, gradient_bytes)
    return round(gathers + reductions + 2 * ring(layout.num_replicas, gradient_bytes // layout.shard_size))


def candidate_layouts(world_size: int, shard_size: int, template: ParallelLayout) -> list[ParallelLayout]:
    """Every strategy that `world_size` ranks can run, with the other settings of `template`."""
    if world_size == 1:
        return [dataclasses.replace(template, strategy="none")]
    candidates = [
        dataclasses.replace(template, strategy="ddp", world_size=world_size),
        dataclasses.replace(template, strategy="fsdp", world_size=world_size, shard_size=world_size),
    ]
    if world_size % shard_size == 0 and 1 < shard_size < world_size:
        candidates.append(dataclasses.replace(template, strategy="hsdp", world_size=world_size, shard_size=shard_size))
    return candidates


def format_table(workload: StepWorkload, candidates: list[ParallelLayout], grad_sync: str, device_bytes: float) -> str:
    """The estimates as text, with a column for each layout."""
    gb = 1e9
    rows: dict[str, list[str]] = {}
    for candidate in candidates:
        layout = resolve_grad_sync(workload, candidate, grad_sync, device_bytes)
        memory = estimate_memory(workload, layout)
        max_batch = largest_batch(workload, candidate, grad_sync, device_bytes)
        replicas = f" {layout.num_replicas} x {layout.shard_size}" if layout.strategy == "hsdp" else ""
        synced = "each micro-step" if layout.sync_each_micro_step else "once"
        cells = {
            "GB per rank": layout.strategy + replicas,
            "sequences at a time": f"{workload.batch.largest_micro_batch:,}",
            **{purpose: f"{num_bytes / gb:.3g}" for purpose, num_bytes in memory.items()},
            "total": f"{sum(memory.values()) / gb:.3g}",
            f"fits {device_bytes / gb:g} GB": "yes" if fits_in_memory(workload, layout, device_bytes) else "no",
            "largest batch_size": f"{max_batch:,}" if max_batch else "none",
            "gradients reduced": "-" if layout.world_size == 1 else synced,
            "GB sent per step": f"{comm_bytes(workload, layout) / gb:.3g}",
        }
        for name, cell in cells.items():
            rows.setdefault(name, []).append(cell)
    left, right = max(map(len, rows)), 2 + max(len(cell) for cells in rows.values() for cell in cells)
    return "\n".join(f"{name:<{left}}" + "".join(f"{cell:>{right}}" for cell in cells) for name, cells in rows.items())
