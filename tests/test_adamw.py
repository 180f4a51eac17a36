"""AdamW is its formula, and weight decay applies to matrices and embeddings only."""

from __future__ import annotations

import torch

from distgpt.models.gpt2 import DecoderLM
from distgpt.optim.optimizers import AdamWConfig


def test_every_parameter_is_updated_once_and_only_matrices_decay() -> None:
    model = DecoderLM(101, 24, 3, 16, 2)
    optimizer = AdamWConfig(weight_decay=0.3).build(model)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    by_decay: dict[float, set[str]] = {0.3: set(), 0.0: set()}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            by_decay[group["weight_decay"]].add(names[id(parameter)])
    assert by_decay[0.3] | by_decay[0.0] == set(names.values()) and not by_decay[0.3] & by_decay[0.0]
    assert all("norm" in name or name.endswith("bias") for name in by_decay[0.0])
    assert not any("norm" in name or name.endswith("bias") for name in by_decay[0.3])


def test_an_update_is_adamws_formula() -> None:
    model = DecoderLM(101, 24, 3, 16, 2)
    optimizer = AdamWConfig(beta1=0.8, beta2=0.9, eps=1e-6, weight_decay=0.5).build(model)
    parameter = model.get_parameter("blocks.0.mlp_up.weight")
    weight = parameter.detach().double().clone()
    m = v = torch.zeros_like(weight)
    signs = torch.where(torch.arange(weight.numel()).view_as(weight) % 3 == 0, -2.0, 3.0)
    for t in range(1, 4):
        gradient = 0.1 * t * signs
        for other in model.parameters():
            other.grad = torch.zeros_like(other)
        parameter.grad = gradient.clone()
        for group in optimizer.param_groups:
            group["lr"] = 0.01 * t
        optimizer.step()
        # Loshchilov & Hutter 2019, algorithm 2.
        m = 0.8 * m + 0.2 * gradient
        v = 0.9 * v + 0.1 * gradient**2
        step = (m / (1 - 0.8**t)) / ((v / (1 - 0.9**t)).sqrt() + 1e-6)
        weight = weight - 0.01 * t * (step + 0.5 * weight)
        torch.testing.assert_close(parameter.double(), weight, rtol=1e-5, atol=1e-7)
