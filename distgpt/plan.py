"""The plan on paper: how a step's sequences are shared, and what a model costs in memory, arithmetic and traffic.

Closed forms only; no torch. `python -m distgpt.config CONFIG --plan` prints them.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

VOCAB_MULTIPLE = 64
"""Vocabulary rows are padded to this multiple: matrix units like round sizes (50,257 becomes 50,304)."""

FP32_BYTES = 4
"""Of a stored weight, of its gradient, and of each of AdamW's two moments: all are fp32 whatever the precision."""

USABLE_FRACTION = 0.9
"""Of a device's memory: the rest goes to the driver, the libraries, and gaps between allocations."""


@dataclass(frozen=True)
class Sizes:
    """A decoder's sizes, and what follows from them."""

    n_vocab: int
    n_embd: int
    n_head: int
    n_positions: int
    n_layer: int

    @property
    def parameters(self) -> int:
        """Trainable numbers: tied token embedding, positions, 12 d^2 + 13 d a layer, the last norm."""
        d = self.n_embd
        return (self.n_vocab + self.n_positions) * d + self.n_layer * (12 * d * d + 13 * d) + 2 * d

    @property
    def block_shapes(self) -> list[tuple[int, ...]]:
        """Shapes of one layer's parameters: norm, qkv, out, norm, up, down."""
        d = self.n_embd
        linears = [((rows, columns), (rows,)) for rows, columns in ((3 * d, d), (d, d), (4 * d, d), (d, 4 * d))]
        return [(d,)] * 4 + [shape for linear in linears for shape in linear]

    @property
    def outer_shapes(self) -> list[tuple[int, ...]]:
        """Shapes of the parameters outside the layers: padded token embedding, positions, last norm."""
        rows = math.ceil(self.n_vocab / VOCAB_MULTIPLE) * VOCAB_MULTIPLE
        return [(rows, self.n_embd), (self.n_positions, self.n_embd), (self.n_embd,), (self.n_embd,)]

    def stored(self, shards: int = 1) -> int:
        """Numbers in the largest shard when each parameter's rows are dealt to `shards` ranks, padding included."""
        shapes = self.outer_shapes + self.block_shapes * self.n_layer
        return sum(math.ceil(shape[0] / shards) * math.prod(shape[1:]) for shape in shapes)

    def flops_per_token(self, seq_len: int) -> int:
        """Floating-point operations of training on one token, forward and backward.

        6 x matmul weights (the tied head counts, the embedding look-up does not) + 12 n_layer n_embd seq_len for
        attention, without a discount for causality (Chowdhery et al. 2022, PaLM, appendix B).
        """
        matmul_weights = self.n_layer * 12 * self.n_embd**2 + self.n_vocab * self.n_embd
        return 6 * matmul_weights + 12 * self.n_layer * self.n_embd * seq_len


@dataclass(frozen=True)
class BatchPlan:
    """How the sequences of one update are shared: ranks x micro-steps x sequences, sizes differing by at most one."""

    sequences: int
    """Sequences per update over all ranks."""
    batch_size: int
    """Most sequences in one forward pass."""
    ranks: int

    @property
    def micro_steps(self) -> int:
        """Forward passes per update, the same on every rank."""
        return math.ceil(self.sequences / (self.batch_size * self.ranks))

    @property
    def largest_micro_batch(self) -> int:
        """Most sequences that any rank feeds through the model at a time."""
        return math.ceil(math.ceil(self.sequences / self.ranks) / self.micro_steps)

    def micro_batches(self, rank: int) -> list[int]:
        """Sequences in each micro-step of `rank`; a size may be 0."""
        mine = len(range(rank, self.sequences, self.ranks))
        return [len(range(i, mine, self.micro_steps)) for i in range(self.micro_steps)]

    def equation(self, seq_len: int) -> str:
        """The batch arithmetic in one line, for people."""
        total = f"{self.sequences:,} sequences ({self.sequences * seq_len:,} tokens) per step"
        shares = {len(range(rank, self.sequences, self.ranks)) for rank in (0, self.ranks - 1)}
        steps = self.micro_steps
        sizes = sorted({size for share in shares for size in (share // steps, -(-share // steps))})
        each = " or ".join([*(f"{size:,}" for size in sizes[:-1]), count(sizes[-1], "sequence")])
        line = f"{total} = {count(self.ranks, 'rank')} x {each} x {count(self.micro_steps, 'micro-step')}"
        full = self.ranks * self.batch_size * self.micro_steps
        if self.sequences * 2 <= full:
            line += f" (ranks at most half full: global_batch_size={full} would fill them)"
        return line


def count(n: int, noun: str) -> str:
    """`1 rank`, `4 ranks`."""
    return f"{n:,} {noun}" + ("" if n == 1 else "s")


@dataclass(frozen=True)
class Layout:
    """How the model is spread over ranks, and what each rank keeps."""

    strategy: str = "none"
    """none (one rank), ddp, fsdp or hsdp."""
    ranks: int = 1
    shard_ranks: int = 1
    """Ranks that together hold one copy of the training state: 1 for none and ddp, all ranks for fsdp."""
    reshard_after_forward: bool = True
    """Whether a block's gathered weights are freed after forward and backward, or kept for the whole update."""
    reduce_each: bool = False
    """Whether gradients are exchanged after each micro-step instead of kept whole until the last."""
    activation_checkpointing: str = "none"
    reduce_dtype: str = "fp32"
    """Type in which gradients travel: fp32 or bf16."""

    @property
    def sharded(self) -> bool:
        """Whether ranks hold parts of the state."""
        return self.strategy in ("fsdp", "hsdp")

    def describe(self) -> str:
        """The layout in a few words, for people."""
        parts = [] if self.strategy == "none" else [self.strategy]
        if self.strategy == "hsdp":
            copies = count(self.ranks // self.shard_ranks, "whole model")
            parts = [f"hsdp ({copies}, each on {count(self.shard_ranks, 'rank')})"]
        if self.activation_checkpointing != "none":
            parts.append(f"{self.activation_checkpointing} recomputation")
        if self.reduce_dtype != "fp32":
            parts.append(f"gradients exchanged in {self.reduce_dtype}")
        return ", ".join(parts)


ACTIVATION_WIDTHS = {
    # (fp32 numbers, numbers in the matmuls' type) kept per token and layer, in units of the width d: the inputs of
    # both norms, then what matmuls, attention and GELU keep: norm 1, qkv 3, attended 1, norm 1,
    # up 4, GELU 4. Selective keeps the layer's input and the outputs of matmuls and attention; full only the input.
    "none": (2, 14),
    "selective": (1, 10),
    "full": (1, 0),
}


@dataclass(frozen=True)
class Work:
    """What a step computes, whatever the layout."""

    sizes: Sizes
    batch: BatchPlan
    seq_len: int
    bf16: bool
    """Whether matmuls are in bf16."""

    @property
    def matmul_bytes(self) -> int:
        """Of a number in a matmul."""
        return 2 if self.bf16 else FP32_BYTES


def memory(work: Work, layout: Layout) -> dict[str, int]:
    """Bytes on the rank that needs most, by purpose, at the worst moment of a step: the turn from forward to backward.

    Counts eager execution with whole logits; compilation and tiling need less. Dropout needs more, and so do masked
    documents (by about an eighth of the activations).
    """
    sizes, batch = work.sizes, work.batch
    outer = sum(math.prod(shape) for shape in sizes.outer_shapes)
    block = sum(math.prod(shape) for shape in sizes.block_shapes)
    whole, mine = sizes.stored(), sizes.stored(layout.shard_ranks)
    gradients = FP32_BYTES * mine
    if not layout.sharded:
        # autocast's, kept for backward unless it computes them again
        copies = 2 * (whole if layout.activation_checkpointing == "none" else outer) if work.bf16 else 0
    else:
        # One block computes while the next is fetched; the outer parameters stay whole, in fp32.
        blocks = min(2, sizes.n_layer) if layout.reshard_after_forward else sizes.n_layer
        copies = FP32_BYTES * outer + work.matmul_bytes * blocks * block
        if layout.reduce_each or batch.micro_steps == 1:
            gradients += FP32_BYTES * (outer + min(2, sizes.n_layer) * block)
        else:
            gradients += FP32_BYTES * whole

    def layer(kind: str) -> int:
        wide, narrow = ACTIVATION_WIDTHS[kind]
        return (FP32_BYTES * wide + work.matmul_bytes * narrow) * sizes.n_embd

    activations = sizes.n_layer * layer(layout.activation_checkpointing)
    if layout.activation_checkpointing != "none":  # one layer is recomputed at a time
        activations += layer("none")
    logits = (work.matmul_bytes + 3 * FP32_BYTES) * sizes.outer_shapes[0][0]  # logits, softmax, two gradients
    embedding_gradient = FP32_BYTES * math.prod(sizes.outer_shapes[0])  # dense, before it is added to the head's
    tokens = batch.largest_micro_batch * work.seq_len
    return {
        "weights": FP32_BYTES * mine,
        "moments": 2 * FP32_BYTES * mine,
        "gradients": gradients + embedding_gradient,
        "weight copies": copies,
        "activations": tokens * activations,
        "logits": tokens * logits,
    }


def fits(work: Work, layout: Layout, device_bytes: float) -> bool:
    """Whether a rank's memory is enough, on paper."""
    return sum(memory(work, layout).values()) <= USABLE_FRACTION * device_bytes


def settle(work: Work, layout: Layout, reduce_gradients: str, device_bytes: float) -> Layout:
    """The layout with `reduce_gradients` resolved: `auto` exchanges on the last micro-step where memory allows."""
    last = dataclasses.replace(layout, reduce_each=False)
    each = reduce_gradients == "each" or (reduce_gradients == "auto" and not fits(work, last, device_bytes))
    return dataclasses.replace(layout, reduce_each=each and layout.sharded)


def largest_batch(work: Work, layout: Layout, reduce_gradients: str, device_bytes: float) -> int:
    """The largest batch_size whose memory fits when every micro-batch is full; 0 where none does."""
    ranks, micro_steps = work.batch.ranks, work.batch.micro_steps
    best = 0
    for bit in reversed(range(20)):
        tried = best + 2**bit
        full = dataclasses.replace(work, batch=BatchPlan(tried * ranks * micro_steps, tried, ranks))
        if fits(full, settle(full, layout, reduce_gradients, device_bytes), device_bytes):
            best = tried
    return best


def traffic(work: Work, layout: Layout) -> int:
    """Bytes that one rank sends in one step, with ring algorithms (Thakur, Rabenseifner & Gropp 2005).

    An all-gather or reduce-scatter of n bytes over r ranks sends (r - 1) / r n, an all-reduce twice that.
    """

    def ring(ranks: int, n_bytes: int) -> float:
        return (ranks - 1) / ranks * n_bytes

    whole, micro_steps = work.sizes.stored(), work.batch.micro_steps
    gradient = whole * (2 if layout.reduce_dtype == "bf16" else FP32_BYTES)
    if not layout.sharded:
        return round(2 * ring(layout.ranks, gradient))
    outer = sum(math.prod(shape) for shape in work.sizes.outer_shapes)
    gathered = work.matmul_bytes * (whole - outer)
    passes, times = (micro_steps, 2) if layout.reshard_after_forward else (1, 1)
    gathers = passes * ring(layout.shard_ranks, times * gathered + FP32_BYTES * outer)
    reductions = (micro_steps if layout.reduce_each else 1) * ring(layout.shard_ranks, gradient)
    copies = layout.ranks // layout.shard_ranks
    return round(gathers + reductions + 2 * ring(copies, gradient // layout.shard_ranks))


def layouts(ranks: int, shard_ranks: int, template: Layout) -> list[Layout]:
    """Every strategy that `ranks` can run, with the other settings of `template`."""
    if ranks == 1:
        return [dataclasses.replace(template, strategy="none")]
    found = [
        dataclasses.replace(template, strategy="ddp", ranks=ranks),
        dataclasses.replace(template, strategy="fsdp", ranks=ranks, shard_ranks=ranks),
    ]
    if ranks % shard_ranks == 0 and 1 < shard_ranks < ranks:
        found.append(dataclasses.replace(template, strategy="hsdp", ranks=ranks, shard_ranks=shard_ranks))
    return found


def table(work: Work, columns: list[Layout], reduce_gradients: str, device_bytes: float) -> str:
    """The plan as text: a column for each layout."""
    gb = 1e9
    rows: dict[str, list[str]] = {}
    for asked in columns:
        layout = settle(work, asked, reduce_gradients, device_bytes)
        parts = memory(work, layout)
        most = largest_batch(work, asked, reduce_gradients, device_bytes)
        copies = f" {layout.ranks // layout.shard_ranks} x {layout.shard_ranks}" if layout.strategy == "hsdp" else ""
        cells = {
            "GB on each rank": layout.strategy + copies,
            "sequences at a time": f"{work.batch.largest_micro_batch:,}",
            **{part: f"{n_bytes / gb:.3g}" for part, n_bytes in parts.items()},
            "total": f"{sum(parts.values()) / gb:.3g}",
            f"fits {device_bytes / gb:g} GB": "yes" if fits(work, layout, device_bytes) else "no",
            "largest batch_size": f"{most:,}" if most else "none",
            "gradients exchanged": "-" if layout.ranks == 1 else "each micro-step" if layout.reduce_each else "once",
            "GB sent per step": f"{traffic(work, layout) / gb:.3g}",
        }
        for name, cell in cells.items():
            rows.setdefault(name, []).append(cell)
    left, right = max(map(len, rows)), 2 + max(len(cell) for cells in rows.values() for cell in cells)
    return "\n".join(f"{name:<{left}}" + "".join(f"{cell:>{right}}" for cell in cells) for name, cells in rows.items())
