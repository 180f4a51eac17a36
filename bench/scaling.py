"""A model of how speed scales with ranks, and a measurement that checks it.

    python -m bench.scaling measure [--ranks 1,2,4]     compare it with real gloo ranks on this machine's CPU
    python -m bench.scaling predict --flops 4e14 --link 3e11 [--ranks 8,64]     predict tokens/s of GPUs

The time of a step is the computation of one rank, the optimizer update, and exposed communication, that is
communication which does not overlap with computation:

    seconds = tokens per rank x FLOPs per token / flops + 28 bytes x parameters per rank / memory
              + max(communication / link - overlapped, last bucket / link)

`communication` is `comm_bytes` of distgpt/distributed/estimate.py. `overlapped` is two thirds of the last micro-step's
computation (its backward) under DDP, all computation under FSDP, which also prefetches weights in forward, and nothing
on a CPU, whose cores are busy.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import distributed as dist

from bench.contest import VOCAB, Shape
from bench.contestants import RunSettings, contestants, run
from bench.work import SHAPES, model_config, prepare
from distgpt.data.sampler import BatchPlan
from distgpt.distributed.estimate import StepWorkload, comm_bytes
from distgpt.distributed.layout import ParallelLayout
from distgpt.errors import pluralize

UPDATE_BYTES = 28
"""Memory traffic of AdamW per parameter: weight, gradient and two moments are read, all but the gradient written."""

BUCKET_BYTES = 25 * 2**20
"""Size of a DDP bucket."""

STEP_TOKENS = 2**19
"""Tokens per update in the predictions: half a million, as for GPT-2 and GPT-3 of these sizes."""


@dataclass(frozen=True)
class Hardware:
    """The speed of one rank's hardware."""

    flops: float
    """Model FLOP/s that training sustains."""
    memory: float
    """Bytes/s."""
    link: float
    """Bytes/s that a rank sends while all ranks send."""
    overlaps: bool = True
    """Whether communication overlaps with computation."""


def make_workload(shape: Shape, sequences: int, world_size: int, batch_size: int) -> StepWorkload:
    """A shape's work per update, its sequences divided among ranks."""
    batch = BatchPlan(sequences, batch_size, world_size)
    return StepWorkload(model_config(shape), VOCAB, batch, shape.positions, "bf16")


def flops_per_token(workload: StepWorkload) -> int:
    """FLOPs of training on one token."""
    return workload.model.flops_per_token(workload.n_vocab, workload.seq_len)


def step_seconds(workload: StepWorkload, layout: ParallelLayout, hardware: Hardware) -> tuple[float, float]:
    """The predicted time of a step, and how much of it is exposed communication."""
    tokens = workload.batch.largest_micro_batch * workload.seq_len
    micro_step = tokens * flops_per_token(workload) / hardware.flops
    update = UPDATE_BYTES * workload.sharded_numel(layout.shard_size) / hardware.memory
    exposed = 0.0
    if layout.world_size > 1:
        overlapping_micro_steps = workload.batch.micro_steps if layout.is_sharded else 2 / 3
        overlapped = micro_step * overlapping_micro_steps if hardware.overlaps else 0.0
        exposed = max(comm_bytes(workload, layout) / hardware.link - overlapped, BUCKET_BYTES / hardware.link)
    return workload.batch.micro_steps * micro_step + update + exposed, exposed


def predict(hardware: Hardware, world_sizes: list[int], reduce_dtype: str) -> None:
    """Print tokens/s and the share of exposed communication for GPT-2's sizes under DDP and FSDP."""
    print(f"{STEP_TOKENS:,} tokens per update; FLOP/s {hardware.flops:.3g}, link {hardware.link:.3g} B/s per rank")
    print("model  ranks  layout  ms/step    tokens/s  of ideal  exposed communication  DDP stops scaling below")
    for name in ("124M", "350M", "1.5B"):
        shape = SHAPES[name]
        for world_size in world_sizes:
            sequences = STEP_TOKENS // shape.positions
            batch_size = min(shape.sequences, max(1, sequences // world_size))
            workload = make_workload(shape, sequences, world_size, batch_size)
            for strategy, shard_size in (("ddp", 1), ("fsdp", world_size)):
                layout = ParallelLayout(strategy, world_size, shard_size, reduce_dtype=reduce_dtype)
                seconds, exposed = step_seconds(workload, layout, hardware)
                ideal = STEP_TOKENS * flops_per_token(workload) / hardware.flops / world_size
                limit = ""
                if layout.strategy == "ddp":
                    communication = comm_bytes(workload, layout) / hardware.link
                    backward_per_token = flops_per_token(workload) / hardware.flops * 2 / 3
                    limit = f"{communication / backward_per_token:,.0f} tokens per rank and micro-step"
                print(
                    f"{name:5}  {world_size:5}  {strategy:6}  {seconds * 1e3:7.1f}  {STEP_TOKENS / seconds:10,.0f}  "
                    f"{ideal / seconds:8.0%}  {exposed / seconds:21.1%}  {limit}".rstrip()
                )


def measure_step(folder: Path, shape: Shape, world_size: int, steps: int = 8) -> float:
    """Median seconds per step of an eager fp32 run on this many ranks of this machine."""
    prepared = prepare(folder, shape, steps)
    settings = RunSettings(prepared, world_size, steps, log_every=1, peers=None, cache=folder / "cache")
    outcome = run(contestants()["distgpt eager"], settings)
    if outcome.failure:
        sys.exit(f"{pluralize(world_size, 'rank')}: {outcome.failure}")
    return statistics.median(row["seconds"] for row in outcome.rows[3:])


def measure_link(world_size: int) -> float:
    """Bytes/s that each of this many gloo ranks sends in an all-reduce of one bucket."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={world_size}"]
    arguments = [*launcher, "-m", "bench.scaling", "link"]
    completed = subprocess.run(arguments, capture_output=True, text=True, check=True)
    return float(completed.stdout.split()[-1])


def print_link() -> None:
    """Time all-reduces on the ranks that torchrun has started."""
    dist.init_process_group("gloo")
    bucket = torch.ones(BUCKET_BYTES // 4)
    times = []
    for _ in range(12):
        dist.barrier()
        started_at = time.perf_counter()
        dist.all_reduce(bucket)
        times.append(time.perf_counter() - started_at)
    world_size = dist.get_world_size()
    if dist.get_rank() == 0:
        print(2 * (world_size - 1) / world_size * BUCKET_BYTES / statistics.median(times[2:]))
    dist.destroy_process_group()


def measure(world_sizes: list[int], shape: Shape) -> None:
    """Fit the model's two constants to one rank, predict more ranks on the same cores, and run them."""
    with tempfile.TemporaryDirectory() as scratch:
        full = measure_step(Path(scratch, "full"), shape, 1)
        half = measure_step(Path(scratch, "half"), replace(shape, sequences=shape.sequences // 2), 1)
        update = max(0.0, 2 * half - full)  # every rank computes the whole update
        workload = make_workload(shape, shape.sequences, 1, shape.sequences)
        flops = shape.tokens * flops_per_token(workload) / (full - update)
        print(f"one rank: {full:.3f} s per step, {half:.3f} s with half the sequences; hence {flops:.3g} FLOP/s and")
        print(f"{update:.3f} s per update. Ranks share the cores: each has 1/ranks of that, for updates too.")
        for world_size in world_sizes:
            link = measure_link(world_size) if world_size > 1 else float("inf")
            memory = UPDATE_BYTES * workload.sharded_numel() / update if update else float("inf")
            hardware = Hardware(flops / world_size, memory / world_size, link, overlaps=False)
            rank_workload = make_workload(shape, shape.sequences, world_size, shape.sequences // world_size)
            predicted, exposed = step_seconds(rank_workload, ParallelLayout("ddp", world_size), hardware)
            measured = full if world_size == 1 else measure_step(Path(scratch, str(world_size)), shape, world_size)
            print(
                f"{pluralize(world_size, 'rank')}: predicted {predicted:.3f} s ({exposed:.3f} s of communication at "
                f"{link / 1e9:.2f} GB/s), measured {measured:.3f} s, {measured / predicted:.2f}x"
            )


def main() -> None:
    """Run the command that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["measure", "predict", "link"], help="link is used by measure itself")
    parser.add_argument("--ranks", help="such as 8,64")
    parser.add_argument("--shape", choices=SHAPES, default="B", help="shape to measure (default B)")
    parser.add_argument("--flops", type=float, default=4e14, help="sustained FLOP/s of a GPU (default 4e14)")
    parser.add_argument(
        "--memory", type=float, default=3e12, help="memory bandwidth of a GPU in bytes/s (default 3e12)"
    )
    parser.add_argument(
        "--link", type=float, default=3e11, help="bytes/s that a GPU sends while all GPUs send (default 3e11)"
    )
    parser.add_argument("--reduce-dtype", choices=["fp32", "bf16"], default="fp32")
    options = parser.parse_args()
    if options.command == "link":
        print_link()
    elif options.command == "measure":
        measure([int(n) for n in (options.ranks or "1,2,4").split(",")], SHAPES[options.shape])
    else:
        hardware = Hardware(options.flops, options.memory, options.link)
        predict(hardware, [int(n) for n in (options.ranks or "8,64").split(",")], options.reduce_dtype)


if __name__ == "__main__":
    main()
