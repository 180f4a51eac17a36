"""AdamW with weight decay by parameter role."""

from __future__ import annotations

import torch

from distgpt.models.language_model import LanguageModel
from distgpt.optim.optimizers import AdamWConfig


def build_adamw(model: LanguageModel, config: AdamWConfig) -> torch.optim.AdamW:
    """torch's fused AdamW (Loshchilov & Hutter 2019); weight decay on matrices and embeddings only."""
    parameters = list(model.named_parameters())
    groups = [
        {
            "params": [p for name, p in parameters if model.parameter_role(name) != "vector"],
            "weight_decay": config.weight_decay,
        },
        {"params": [p for name, p in parameters if model.parameter_role(name) == "vector"], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=0.0, betas=(config.beta1, config.beta2), eps=config.eps, fused=True)
