"""What the contestants of `python -m bench.speed` share: their task, its batches and weights, and a line a step.

It runs in the environments of the peers too, so it imports nothing of distgpt.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import resource
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

VOCAB = 50257
LEARNING_RATE, BETAS, EPS, WEIGHT_DECAY, GRAD_CLIP = 5e-4, (0.9, 0.95), 1e-8, 0.01, 1.0


@dataclass(frozen=True)
class Shape:
    """A model and its batch."""

    layers: int
    heads: int
    width: int
    positions: int
    """Tokens in a sequence."""
    sequences: int
    """Of an update, over all ranks."""

    @property
    def tokens(self) -> int:
        """Of an update, over all ranks."""
        return self.sequences * self.positions


@dataclass(frozen=True)
class Task:
    """What a contestant has to do."""

    folder: Path
    """Where the harness has put the shape, the batches and the initial weights."""
    steps: int
    precision: str
    accumulate: int
    """Micro-steps of an update."""
    log_every: int
    rank: int
    ranks: int

    @property
    def shape(self) -> Shape:
        """The model's sizes and the batch's."""
        return Shape(**json.loads((self.folder / "shape.json").read_text()))

    @property
    def device(self) -> torch.device:
        """A GPU if there is one."""
        if not torch.cuda.is_available():
            return torch.device("cpu")
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))

    def batches(self) -> np.ndarray:
        """Token ids of all steps and ranks, of shape (steps, sequences, positions + 1), on disk."""
        found: np.ndarray = np.load(self.folder / "batches.npy", mmap_mode="r")
        return found

    def initial_weights(self) -> dict[str, Tensor]:
        """distgpt's initial weights, under its names."""
        from safetensors.torch import load_file

        weights: dict[str, Tensor] = load_file(self.folder / "initial.safetensors")
        return weights


def micro_batches(task: Task, batch: np.ndarray) -> list[tuple[Tensor, Tensor]]:
    """This rank's share of an update on its device: ids and the id that follows each, micro-step by micro-step."""
    rows = torch.from_numpy(batch[task.rank :: task.ranks].astype(np.int64)).to(task.device)
    return [(part[:, :-1], part[:, 1:]) for part in rows.chunk(task.accumulate)]


def renamed(weights: dict[str, Tensor], names: dict[str, str]) -> dict[str, Tensor]:
    """Weights under a peer's names, which differ in these parts."""
    result = {}
    for name, values in weights.items():
        new = name
        for ours, theirs in names.items():
            new = new.replace(ours, theirs)
        result[new] = values
    return result


def read_task(description: str) -> Task:
    """A contestant's command line."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("folder", type=Path, help="made by the harness: shape.json, batches.npy, initial.safetensors")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--accumulate", type=int, default=1, help="micro-steps of an update (default 1)")
    parser.add_argument("--log-every", type=int, default=1, help="steps between lines (default 1)")
    rank, ranks = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    return Task(**vars(parser.parse_args()), rank=rank, ranks=ranks)


class Clock:
    """Times steps, and prints a line for the first and for every so many; what a line costs is not timed."""

    def __init__(self, task: Task) -> None:
        self.task, self.tokens, self.last_step = task, task.shape.tokens, 0
        self.started_at = time.perf_counter()

    def due(self, step: int) -> bool:
        """Whether this step (from 1) gets a line."""
        return step == 1 or step % self.task.log_every == 0

    def done(self, step: int, loss: float) -> None:
        """Print the mean time of the steps since the last line. Every rank calls, with its share's mean loss."""
        seconds = (time.perf_counter() - self.started_at) / (step - self.last_step)
        ranks: list[tuple[float, int]] = [(loss, peak_mib())]
        if self.task.ranks > 1:
            ranks = ranks * self.task.ranks
            dist.all_gather_object(ranks, (loss, peak_mib()))
        line = {
            "step": step,
            "seconds": round(seconds, 5),
            "tokens_per_second": round(self.tokens / seconds, 1),
            "loss": sum(loss for loss, _ in ranks) / len(ranks),
            "rss_mib": max(peak for _, peak in ranks),
        }
        if self.task.rank == 0:
            print(json.dumps(line), flush=True)
        self.last_step, self.started_at = step, time.perf_counter()


def peak_mib() -> int:
    """The most memory this process has used at a time: tensors on a GPU, else what is resident."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() // 2**20
    try:
        # Not getrusage where it can be helped: its figure goes on from the process that started this one.
        found = re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())
    except OSError:
        found = None
    return (int(found[1]) if found else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss) // 1024
