"""The schedule is its closed form, and decay touches matrices only."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch

from distgpt.config import OptimizerConfig
from distgpt.model import DecoderLM
from distgpt.optim import build_optimizer, learning_rate, set_learning_rate


@pytest.mark.parametrize(("warmup", "steps"), [(10, 2000), (0, 10), (10, 10), (1, 1), (0, 1)])
def test_the_schedule_rises_falls_and_stays(warmup: int, steps: int) -> None:
    rates = [learning_rate(step, warmup, steps, 1e-4, 5e-4) for step in range(steps + 5)]
    assert all(a < b for a, b in pairwise(rates[:warmup]))
    assert all(a > b for a, b in pairwise(rates[warmup : steps + 1]))
    assert rates[steps:] == [1e-4] * 5
    middle = (warmup + steps) / 2
    if middle.is_integer() and steps > warmup:
        assert rates[int(middle)] == pytest.approx(3e-4)
    for step in range(warmup):
        assert rates[step] == pytest.approx(5e-4 * step / warmup)


def test_every_parameter_is_updated_once_and_only_matrices_decay() -> None:
    model = DecoderLM(101, 24, 3, 16, 2)
    optimizer = build_optimizer(model, OptimizerConfig(weight_decay=0.3))
    decayed = {id(p) for group in optimizer.param_groups for p in group["params"] if group["weight_decay"] == 0.3}
    kept = {id(p) for group in optimizer.param_groups for p in group["params"] if group["weight_decay"] == 0.0}
    names = {id(p): name for name, p in model.named_parameters()}
    assert decayed | kept == set(names) and not decayed & kept
    assert all("norm" in names[p] or names[p].endswith("bias") for p in kept)
    assert not any("norm" in names[p] or names[p].endswith("bias") for p in decayed)


def test_an_update_is_adamws_formula() -> None:
    model = torch.nn.Linear(3, 2)
    config = OptimizerConfig(beta1=0.8, beta2=0.9, eps=1e-6, weight_decay=0.5)
    optimizer = build_optimizer(model, config)
    weight = model.weight.detach().double().clone()
    m = v = torch.zeros_like(weight)
    for t in range(1, 4):
        gradient = torch.full((2, 3), 0.1 * t) * torch.tensor([[1.0, -2.0, 3.0]])
        model.weight.grad, model.bias.grad = gradient.clone(), torch.zeros(2)
        set_learning_rate(optimizer, 0.01 * t)
        optimizer.step()
        # Loshchilov & Hutter 2019, algorithm 2.
        m = 0.8 * m + 0.2 * gradient
        v = 0.9 * v + 0.1 * gradient**2
        step = (m / (1 - 0.8**t)) / ((v / (1 - 0.9**t)).sqrt() + 1e-6)
        weight = weight - 0.01 * t * (step + 0.5 * weight)
        torch.testing.assert_close(model.weight.double(), weight, rtol=1e-5, atol=1e-7)


def test_warmup_of_zero_starts_at_the_top() -> None:
    assert learning_rate(0, 0, 100, 0.0, 1.0) == 1.0
    assert learning_rate(50, 0, 100, 0.0, 1.0) == pytest.approx(0.5 * (1 + math.cos(math.pi / 2)))
