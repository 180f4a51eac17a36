"""The optimizers that a config can name, with their settings. Imports no torch.

To add one, write its settings here, a `torch.optim.Optimizer` in a file of its own, and add it to `OPTIMIZERS`. The
optimizer step is skipped where the gradient is not finite, under every optimizer: see `training.step`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, Strict
from pydantic.dataclasses import dataclass

from distgpt.config.fields import SECTION, Fraction, Rate, union_of

if TYPE_CHECKING:
    import torch

    from distgpt.models.language_model import LanguageModel


@dataclass(frozen=True, kw_only=True, config=SECTION)
class AdamWConfig:
    """AdamW (Loshchilov & Hutter 2019)."""

    name: Literal["adamw"] = "adamw"
    """Optimizer."""
    beta1: Fraction = 0.9
    """Decay of the running mean of gradients."""
    beta2: Fraction = 0.95
    """Decay of the running mean of squared gradients."""
    eps: Annotated[float, Strict(), Field(gt=0, le=1)] = 1e-8
    """Added to the root of the mean square before dividing by it."""
    weight_decay: Rate = 0.1
    """Decoupled weight decay of matrices and embeddings; biases and norms have none."""
    grad_clip: Annotated[float, Strict(), Field(gt=0, le=10**9)] = 1.0
    """Largest global gradient norm; larger gradients are scaled down to it."""

    def build(self, model: LanguageModel) -> torch.optim.Optimizer:
        """The optimizer of the model's parameters, with learning rate 0. Call it after the model is parallelized."""
        from distgpt.optim.adamw import build_adamw

        return build_adamw(model, self)


OPTIMIZERS = {"adamw": AdamWConfig}
"""Every optimizer by its name."""

if TYPE_CHECKING:
    OptimizerConfig = AdamWConfig
else:
    OptimizerConfig = union_of(OPTIMIZERS, "name")
"""The type of the section `optimizer`."""
