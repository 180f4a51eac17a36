"""What all contestants of `python -m bench.speed` use: their task, its batches and weights, and the timing of steps.

It also runs in the environments of the peers, so it does not import distgpt.
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
    """Per update, over all ranks."""

    @property
    def tokens(self) -> int:
        """Per update, over all ranks."""
        return self.sequences * self.positions


@dataclass(frozen=True)
class Task:
    """What a contestant computes."""

    folder: Path
    """Contains the shape, the batches and the initial weights."""
    steps: int
    precision: str
    accumulate: int
    """Micro-steps per update."""
    log_every: int
    rank: int
    world_size: int

    @property
    def shape(self) -> Shape:
        """The sizes of the model and the batch."""
        return Shape(**json.loads((self.folder / "shape.json").read_text()))

    @property
    def device(self) -> torch.device:
        """A GPU if there is one."""
        if not torch.cuda.is_available():
            return torch.device("cpu")
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))

    def batches(self) -> np.ndarray:
        """Token ids of all steps and ranks, of shape (steps, sequences, positions + 1), memory-mapped."""
        batches: np.ndarray = np.load(self.folder / "batches.npy", mmap_mode="r")
        return batches

    def initial_weights(self) -> dict[str, Tensor]:
        """distgpt's initial weights, under distgpt's names."""
        from safetensors.torch import load_file

        weights: dict[str, Tensor] = load_file(self.folder / "initial.safetensors")
        return weights


def micro_batches(task: Task, batch: np.ndarray) -> list[tuple[Tensor, Tensor]]:
    """This rank's share of an update on its device: (ids, targets) of each micro-step."""
    rows = torch.from_numpy(batch[task.rank :: task.world_size].astype(np.int64)).to(task.device)
    return [(part[:, :-1], part[:, 1:]) for part in rows.chunk(task.accumulate)]


def rename_weights(weights: dict[str, Tensor], names: dict[str, str]) -> dict[str, Tensor]:
    """The weights under a peer's names. `names` maps parts of distgpt's names to the peer's."""
    result = {}
    for name, values in weights.items():
        peer_name = name
        for distgpt_part, peer_part in names.items():
            peer_name = peer_name.replace(distgpt_part, peer_part)
        result[peer_name] = values
    return result


def read_task(description: str) -> Task:
    """The task from a contestant's command line."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("folder", type=Path, help="contains shape.json, batches.npy and initial.safetensors")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--accumulate", type=int, default=1, help="micro-steps per update (default 1)")
    parser.add_argument("--log-every", type=int, default=1, help="steps between printed lines (default 1)")
    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    return Task(**vars(parser.parse_args()), rank=rank, world_size=world_size)


class StepTimer:
    """Times steps and prints a JSON line after the first step and every `log_every` steps. Printing is not timed."""

    def __init__(self, task: Task) -> None:
        self.task, self.tokens, self.last_step = task, task.shape.tokens, 0
        self.started_at = time.perf_counter()

    def is_due(self, step: int) -> bool:
        """Whether a line is printed after this step (from 1)."""
        return step == 1 or step % self.task.log_every == 0

    def log(self, step: int, loss: float) -> None:
        """Print the mean time of the steps since the last line. Every rank calls, with the mean loss of its share."""
        seconds = (time.perf_counter() - self.started_at) / (step - self.last_step)
        by_rank: list[tuple[float, int]] = [(loss, peak_mib())]
        if self.task.world_size > 1:
            by_rank = by_rank * self.task.world_size
            dist.all_gather_object(by_rank, (loss, peak_mib()))
        line = {
            "step": step,
            "seconds": round(seconds, 5),
            "tokens_per_second": round(self.tokens / seconds, 1),
            "loss": sum(loss for loss, _ in by_rank) / len(by_rank),
            "rss_mib": max(peak for _, peak in by_rank),
        }
        if self.task.rank == 0:
            print(json.dumps(line), flush=True)
        self.last_step, self.started_at = step, time.perf_counter()


def peak_mib() -> int:
    """This process's peak memory: tensors on a GPU, else the resident set."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() // 2**20
    try:
        # Preferred to getrusage, whose maximum includes that of the process that forked this one.
        match = re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())
    except OSError:
        match = None
    return (int(match[1]) if match else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss) // 1024
