"""The values that the exercise distgpt grew out of published for its own tests."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from distgpt.config import OptimizerConfig
from distgpt.data import ShuffledReader
from distgpt.generate import next_token_probabilities
from distgpt.loss import plain_loss
from distgpt.model import DecoderLM
from distgpt.optim import build_optimizer, learning_rate, set_learning_rate
from distgpt.parallel import Running
from distgpt.plan import BatchPlan, Layout
from distgpt.shards import open_tokens
from distgpt.step import train_step
from distgpt.world import World

ALONE = World(rank=0, size=1, local_size=1, device=torch.device("cpu"), threads=1)


def test_the_learning_rate_schedule() -> None:
    rates = [learning_rate(step, 5, 10, 0.01, 0.1) for step in [*range(11), 11, 12, 1000]]
    published = [0, 0.02, 0.04, 0.06, 0.08, 0.1, 0.0914, 0.0689, 0.0411, 0.0186, 0.01, 0.01, 0.01, 0.01]
    np.testing.assert_allclose(rates, published, atol=5e-5)


def test_the_loss_of_known_logits() -> None:
    ids_BT = torch.tensor([[0, 1, 2], [2, 1, 0]])
    logits_PV = torch.tensor([1.0, -2.0, 3.0]).expand(4, 3)  # everywhere; through the identity as weights
    loss = plain_loss(logits_PV, torch.eye(3), ids_BT[:, 1:].flatten(), 3) / 4
    assert float(loss) == pytest.approx(3.1328, abs=5e-5)


@pytest.mark.parametrize("temperature", [0.1, 0.5, 1.0, 2.0, 100.0])
def test_softmax_with_temperature(temperature: float) -> None:
    logits = [[1.0, -2.0, 3.0], [0.0, 0.0, 0.0]]
    got = next_token_probabilities(torch.tensor(logits), temperature)
    for row, ours in zip(logits, got.tolist(), strict=True):
        weights = [math.exp(value / temperature) for value in row]
        assert ours == pytest.approx([weight / sum(weights) for weight in weights], rel=1e-5)


def test_temperature_zero_takes_the_largest() -> None:
    assert next_token_probabilities(torch.tensor([[1.0, -2.0, 3.0]]), 0.0).tolist() == [[0.0, 0.0, 1.0]]
    assert next_token_probabilities(torch.tensor([[1.0, -2.0, 3.0]]), 1e-8).tolist() == [[0.0, 0.0, 1.0]]


def train_on(stream: np.ndarray, folder: Path, steps: int) -> list[float]:
    """Losses of the exercise's small model on a stream of tokens below 8."""
    np.save(folder / "stream.npy", stream.astype(np.uint16))
    model = DecoderLM(n_vocab=8, n_embd=16, n_head=8, n_positions=16, n_layer=2)
    running = Running(model, Layout())
    optimizer = build_optimizer(model, OptimizerConfig())
    set_learning_rate(optimizer, 5e-4)
    reader = ShuffledReader(open_tokens(folder / "stream.npy")["tokens"], 8, 16, 0, BatchPlan(8, 8, 1), 0)
    results = [train_step(running, optimizer, reader.at(step), 8 * 16, 1.0, ALONE) for step in range(steps)]
    return [float(result.loss_sum) / (8 * 16) for result in results]


def test_an_unlearnable_stream_stays_at_ln_v(tmp_path: Path) -> None:
    losses = train_on(np.random.default_rng(0).integers(0, 8, 100_000), tmp_path, 300)
    assert np.mean(losses[-50:]) == pytest.approx(math.log(8), abs=0.02)
    assert min(losses) > math.log(8) - 0.1


def test_counting_up_is_learned(tmp_path: Path) -> None:
    losses = train_on(np.arange(100_000) % 8, tmp_path, 300)
    assert losses[0] == pytest.approx(math.log(8), rel=0.02)
    assert losses[-1] < 1.3
