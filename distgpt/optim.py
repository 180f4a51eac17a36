"""How weights move: parameter groups, the optimizer, and the learning rate by step."""

from __future__ import annotations

import math

import torch
from torch import nn

from distgpt.config import OptimizerConfig


def build_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    """AdamW (Loshchilov & Hutter 2019), fused; weight decay on matrices and embeddings, not on biases and norms."""
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=0.0, betas=(config.beta1, config.beta2), eps=config.eps, fused=True)


def learning_rate(step: int, num_warmup_steps: int, num_training_steps: int, min_lr: float, max_lr: float) -> float:
    """Linear warm-up to `max_lr`, then half a cosine down to `min_lr` (Loshchilov & Hutter 2017, section 3).

    Step 0 gives 0 where there is a warm-up; from `num_training_steps` on the value is `min_lr`.
    """
    if step < num_warmup_steps:
        return max_lr * step / num_warmup_steps
    if step >= num_training_steps:
        return min_lr
    progress = (step - num_warmup_steps) / (num_training_steps - num_warmup_steps)
    return min_lr + (max_lr - min_lr) * 0.5 * (1 + math.cos(math.pi * progress))


def set_learning_rate(optimizer: torch.optim.Optimizer, value: float) -> None:
    """Use `value` for the next update."""
    for group in optimizer.param_groups:
        group["lr"] = value
