"""One optimizer step: micro-steps, backward, gradient clipping, update."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from distgpt.data.dataloader import Batch
from distgpt.distributed.runtime import RuntimeConfig
from distgpt.models.cross_entropy import IGNORE_INDEX


@dataclass(frozen=True)
class StepSettings:
    """Constants of a run's steps."""

    num_targets: int
    """Target tokens of one update over all ranks and micro-steps."""
    max_grad_norm: float
    dp_size: int
    """Data-parallel ranks."""
    runtime: RuntimeConfig


@dataclass(frozen=True)
class StepResult:
    """What one update measured, still on the device: reading it waits for the device."""

    loss_sum: Tensor
    """Sum of this rank's token losses in nats (fp32 scalar); summed over ranks it is the step's."""
    grad_norm: Tensor
    """Global gradient norm before clipping, the same on every rank."""
    skipped: Tensor
    """1 where the gradient was not finite and the weights were left unchanged, else 0."""
    extra: dict[str, Tensor] = field(default_factory=dict)
    """Further numbers to log by name, such as the gradient norm of a layer; the same on every rank."""


def train_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, micro_batches: Sequence[Batch], settings: StepSettings
) -> StepResult:
    """Update the weights with the gradient of the mean loss over all targets of the step. All ranks must call.

    Each micro-step's summed loss is divided by the step's global number of targets, so that neither accumulation nor
    uneven ranks weigh a token differently. DDP and FSDP average over ranks; multiplying by their number cancels that.
    """
    optimizer.zero_grad(set_to_none=True)
    losses = []
    for index, batch in enumerate(micro_batches):
        with gradient_sync(model, settings.runtime, is_last=index == len(micro_batches) - 1):
            with settings.runtime.autocast():
                loss = model(batch.ids_BT, targets=batch.targets_BT, documents=batch.documents)
            (loss * (settings.dp_size / settings.num_targets)).backward()
        losses.append(loss.detach())
    grad_norm = clip_gradients(model, settings.max_grad_norm)
    skipped = (~grad_norm.isfinite()).float()
    step_unless(skipped, optimizer)
    return StepResult(torch.stack(losses).sum(), grad_norm, skipped)


@contextmanager
def gradient_sync(model: nn.Module, runtime: RuntimeConfig, is_last: bool) -> Iterator[None]:
    """Around forward and backward of a micro-step: gradients are reduced over ranks only on the last of an update.

    FSDP with `sync_each_micro_step` accumulates shards instead of whole gradients, at the price of a reduction each.
    """
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(is_last or runtime.layout.sync_each_micro_step)
        model.set_requires_all_reduce(is_last)
        model.set_reshard_after_backward(is_last or runtime.layout.reshard_after_forward)
    if isinstance(model, DistributedDataParallel) and not is_last:
        with model.no_sync():
            yield
    else:
        yield


@torch.no_grad()
def clip_gradients(model: nn.Module, max_norm: float) -> Tensor:
    """Scale the gradient down if its norm exceeds `max_norm`; returns the global norm, the same on every rank."""
    parameters = list(model.parameters())
    norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    if isinstance(norm, DTensor):  # a partial norm, of this rank's shards
        norm = norm.full_tensor()
    nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
    return norm


def step_unless(skipped: Tensor, optimizer: torch.optim.Optimizer) -> None:
    """Update the weights unless `skipped` is 1, under any optimizer.

    Optimizers that support torch's `found_inf` protocol (fused AdamW) decide on the device. For all others, and on
    Apple GPUs, whose fused kernel ignores it, the host waits for the device and skips the call.
    """
    if getattr(optimizer, "_step_supports_amp_scaling", False) and skipped.device.type != "mps":
        optimizer.found_inf = skipped  # type: ignore[attr-defined]
        optimizer.step()
    elif not skipped:
        optimizer.step()


def warm_up(model: nn.Module, micro_batches: Sequence[Batch], runtime: RuntimeConfig) -> None:
    """Run a step's first and last micro-batch without targets, so that all gradients are zero. All ranks must call.

    This keeps compilation out of the measured speed. It also lets DDP rebuild its gradient buckets, which it does after
    its first backward: otherwise a resumed run's first update would reduce gradients in another order than before.
    """
    ends = [micro_batches[0], micro_batches[-1]] if len(micro_batches) > 1 else [micro_batches[0]]
    for index, batch in enumerate(ends):
        with gradient_sync(model, runtime, is_last=index == len(ends) - 1):
            no_targets_BT = torch.full_like(batch.targets_BT, IGNORE_INDEX)
            with runtime.autocast():
                loss = model(batch.ids_BT, targets=no_targets_BT, documents=batch.documents)
            loss.backward()
    model.zero_grad(set_to_none=True)


def seed_dropout(seed: int, step: int, rank: int) -> None:
    """Seed this step's dropout on this rank: reproducible, and different on every rank."""
    digest = hashlib.sha256(f"{seed}/dropout/{step}/{rank}".encode()).digest()
    torch.manual_seed(int.from_bytes(digest[:8], "little") % 2**63)
