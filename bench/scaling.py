"""What more ranks should bring, on paper, and whether they do.

    python -m bench.scaling measure [--ranks 1,2,4]     the model against real gloo ranks on this machine's CPU
    python -m bench.scaling predict --flops 4e14 --link 3e11 [--ranks 8,64]     tokens/s of GPUs, nothing run

A step takes what one rank computes, the update, and what of the exchange is not hidden behind computation:

    seconds = tokens of a rank x FLOPs a token / flops + 28 bytes x parameters held / memory
              + max(traffic / link - hidden, last bucket / link)

`traffic` is the plan's (distgpt/plan.py), `hidden` two thirds of the last micro-step's computation (its backward) under
DDP, all of it under FSDP, which prefetches weights in forward too, and nothing on a CPU, whose cores are busy.
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

from bench.contest import Shape
from bench.contestants import Race, contestants, run
from bench.work import SHAPES, prepare, sizes_of
from distgpt.plan import BatchPlan, Layout, Work, count, traffic

UPDATE_BYTES = 28
"""Of a parameter in AdamW: weight, gradient and two moments are read, all but the gradient written."""

BUCKET_BYTES = 25 * 2**20
"""Of gradients that DDP exchanges at a time."""

STEP_TOKENS = 2**19
"""Of an update in the predictions: half a million, as GPT-2 and GPT-3 used at these sizes."""


@dataclass(frozen=True)
class Machine:
    """What a rank has."""

    flops: float
    """Model FLOP/s that training sustains."""
    memory: float
    """Bytes/s."""
    link: float
    """Bytes/s that a rank sends while all do."""
    hides: bool = True
    """Whether the exchange goes on beside computation."""


def work_of(shape: Shape, sequences: int, ranks: int, batch_size: int) -> Work:
    """A shape's work, the update's sequences shared among ranks."""
    return Work(sizes_of(shape), BatchPlan(sequences, batch_size, ranks), shape.positions, bf16=True)


def step_seconds(work: Work, layout: Layout, machine: Machine) -> tuple[float, float]:
    """A step's time on paper, and how much of it is exchange that nothing hides."""
    tokens = work.batch.largest_micro_batch * work.seq_len
    micro_step = tokens * work.sizes.flops_per_token(work.seq_len) / machine.flops
    update = UPDATE_BYTES * work.sizes.stored(layout.shard_ranks) / machine.memory
    exposed = 0.0
    if layout.ranks > 1:
        computing = work.batch.micro_steps if layout.sharded else 2 / 3
        hidden = micro_step * computing if machine.hides else 0.0
        exposed = max(traffic(work, layout) / machine.link - hidden, BUCKET_BYTES / machine.link)
    return work.batch.micro_steps * micro_step + update + exposed, exposed


def predict(machine: Machine, many: list[int], reduce_dtype: str) -> None:
    """Print tokens/s and the exchange's share for GPT-2's sizes under DDP and FSDP."""
    print(f"{STEP_TOKENS:,} tokens an update; FLOP/s {machine.flops:.3g}, link {machine.link:.3g} B/s a rank")
    print("model  ranks  layout  ms/step    tokens/s  of ideal  exchange not hidden  DDP stops scaling below")
    for name in ("124M", "350M", "1.5B"):
        shape = SHAPES[name]
        for ranks in many:
            sequences = STEP_TOKENS // shape.positions
            batch_size = min(shape.sequences, max(1, sequences // ranks))
            work = work_of(shape, sequences, ranks, batch_size)
            for strategy, shards in (("ddp", 1), ("fsdp", ranks)):
                layout = Layout(strategy, ranks, shards, reduce_dtype=reduce_dtype)
                seconds, exposed = step_seconds(work, layout, machine)
                ideal = STEP_TOKENS * work.sizes.flops_per_token(work.seq_len) / machine.flops / ranks
                least = ""
                if layout.strategy == "ddp":
                    exchange = traffic(work, layout) / machine.link
                    per_token = work.sizes.flops_per_token(work.seq_len) / machine.flops * 2 / 3
                    least = f"{exchange / per_token:,.0f} tokens a rank and micro-step"
                print(
                    f"{name:5}  {ranks:5}  {layout.strategy:6}  {seconds * 1e3:7.1f}  {STEP_TOKENS / seconds:10,.0f}  "
                    f"{ideal / seconds:8.0%}  {exposed / seconds:19.1%}  {least}"
                )


def measured_step(folder: Path, shape: Shape, ranks: int, steps: int = 8) -> float:
    """Median seconds of a step of plain fp32 on so many ranks of this machine."""
    race = Race(prepare(folder, shape, steps), ranks, steps, log_every=1, peers=None, cache=folder / "cache")
    outcome = run(contestants()["distgpt plain"], race)
    if outcome.failure:
        sys.exit(f"{ranks} ranks: {outcome.failure}")
    return statistics.median(row["seconds"] for row in outcome.rows[3:])


def link_of(ranks: int) -> float:
    """Bytes/s that each of so many gloo ranks sends in an all-reduce of a bucket."""
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    found = subprocess.run([*start, "-m", "bench.scaling", "link"], capture_output=True, text=True, check=True)
    return float(found.stdout.split()[-1])


def show_link() -> None:
    """Time all-reduces on the ranks that torchrun has started."""
    dist.init_process_group("gloo")
    bucket = torch.ones(BUCKET_BYTES // 4)
    times = []
    for _ in range(12):
        dist.barrier()
        started_at = time.perf_counter()
        dist.all_reduce(bucket)
        times.append(time.perf_counter() - started_at)
    ranks = dist.get_world_size()
    if dist.get_rank() == 0:
        print(2 * (ranks - 1) / ranks * BUCKET_BYTES / statistics.median(times[2:]))
    dist.destroy_process_group()


def measure(many: list[int], shape: Shape) -> None:
    """Fit one rank's two constants, predict more ranks on the same cores, and run them."""
    with tempfile.TemporaryDirectory() as scratch:
        whole = measured_step(Path(scratch, "whole"), shape, 1)
        half = measured_step(Path(scratch, "half"), replace(shape, sequences=shape.sequences // 2), 1)
        repeated = max(0.0, 2 * half - whole)  # the update, which every rank makes for itself
        work = work_of(shape, shape.sequences, 1, shape.sequences)
        flops = shape.tokens * work.sizes.flops_per_token(shape.positions) / (whole - repeated)
        print(f"one rank: {whole:.3f} s a step, {half:.3f} s with half the sequences; so {flops:.3g} FLOP/s and")
        print(f"{repeated:.3f} s of update. Ranks share the cores: each computes at 1/ranks of that, updates likewise.")
        for ranks in many:
            link = link_of(ranks) if ranks > 1 else float("inf")
            memory = UPDATE_BYTES * work.sizes.stored() / repeated if repeated else float("inf")
            machine = Machine(flops / ranks, memory / ranks, link, hides=False)
            shared = work_of(shape, shape.sequences, ranks, shape.sequences // ranks)
            predicted, exposed = step_seconds(shared, Layout("ddp", ranks), machine)
            found = whole if ranks == 1 else measured_step(Path(scratch, str(ranks)), shape, ranks)
            print(
                f"{count(ranks, 'rank')}: predicted {predicted:.3f} s ({exposed:.3f} s of exchange at "
                f"{link / 1e9:.2f} GB/s), measured {found:.3f} s, {found / predicted:.2f}x"
            )


def main() -> None:
    """Read the command line and do what it says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["measure", "predict", "link"], help="link: for measure's own ranks")
    parser.add_argument("--ranks", help="such as 8,64")
    parser.add_argument("--shape", choices=SHAPES, default="B", help="to measure (default B)")
    parser.add_argument("--flops", type=float, default=4e14, help="FLOP/s that a GPU sustains (default 4e14)")
    parser.add_argument("--memory", type=float, default=3e12, help="its bytes/s (default 3e12)")
    parser.add_argument("--link", type=float, default=3e11, help="bytes/s a GPU sends while all do (default 3e11)")
    parser.add_argument("--reduce-dtype", choices=["fp32", "bf16"], default="fp32")
    options = parser.parse_args()
    if options.what == "link":
        show_link()
    elif options.what == "measure":
        measure([int(n) for n in (options.ranks or "1,2,4").split(",")], SHAPES[options.shape])
    else:
        machine = Machine(options.flops, options.memory, options.link)
        predict(machine, [int(n) for n in (options.ranks or "8,64").split(",")], options.reduce_dtype)


if __name__ == "__main__":
    main()
