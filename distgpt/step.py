"""One optimizer step: micro-steps, backward, clip, update."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor

from distgpt.data import Batch
from distgpt.loss import IGNORED
from distgpt.parallel import Running
from distgpt.world import World


@dataclass(frozen=True)
class StepResult:
    """What one update measured, still on the device: reading it waits for the device."""

    loss_sum: Tensor
    """Sum of this rank's token losses in nats (fp32, scalar); summed over ranks it is the step's."""
    grad_norm: Tensor
    """Global gradient norm before clipping, the same on every rank."""
    skipped: Tensor
    """1 where the gradient was not finite and the weights were left as they are, else 0."""


def train_step(
    running: Running,
    optimizer: torch.optim.Optimizer,
    batches: list[Batch],
    tokens: int,
    grad_clip: float,
    world: World,
) -> StepResult:
    """Update the weights with the gradient of the mean loss over all `tokens` targets of the step. Every rank calls.

    Each micro-step's summed loss is divided by the step's global count, so that neither accumulation nor uneven ranks
    can weigh a token differently; DDP and FSDP average over ranks, which multiplying by their number cancels.
    Where the gradient is not finite the fused optimizer leaves the weights as they are, on all ranks alike.
    """
    optimizer.zero_grad(set_to_none=True)
    losses = []
    for index, batch in enumerate(batches):
        with running.micro_step(last=index == len(batches) - 1):
            loss = running(batch.ids_BT, targets_BT=batch.targets_BT, documents=batch.documents)
            (loss * (world.size / tokens)).backward()  # type: ignore[no-untyped-call]
        losses.append(loss.detach())
    grad_norm = running.clip_gradients(grad_clip)
    skipped = (~grad_norm.isfinite()).float()
    optimizer.found_inf = skipped  # type: ignore[attr-defined]  # read by fused optimizers, on the device
    if world.device.type != "mps" or not skipped:  # Apple's fused kernel does not read found_inf
        optimizer.step()
    return StepResult(torch.stack(losses).sum(), grad_norm, skipped)


def warm_up(running: Running, batches: list[Batch], world: World) -> None:
    """Run a step's first and last micro-batch without targets, so that all gradients are zero. Every rank calls.

    It compiles before the clock starts, and it lets DDP settle its buckets, which it orders anew after its first
    backward: without it, a resumed run's first update would add gradients in another order than the run it goes on.
    """
    ends = batches[:1] if len(batches) == 1 else [batches[0], batches[-1]]
    for batch in ends:
        with running.micro_step(last=batch is ends[-1]):
            nothing_BT = torch.full_like(batch.targets_BT, IGNORED)
            loss = running(batch.ids_BT, targets_BT=nothing_BT, documents=batch.documents)
            loss.backward()  # type: ignore[no-untyped-call]
    running.module.zero_grad(set_to_none=True)


def seed_dropout(seed: int, step: int, rank: int) -> None:
    """Give this step's dropout on this rank a stream of its own: reproducible, and no two ranks alike."""
    digest = hashlib.sha256(f"{seed}/dropout/{step}/{rank}".encode()).digest()
    torch.manual_seed(int.from_bytes(digest[:8], "little") % 2**63)
