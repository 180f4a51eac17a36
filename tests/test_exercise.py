"""Values published with the course exercise (llms-hw2) that distgpt began as, for the tests of its solutions."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from distgpt.data.dataloader import TrainLoader
from distgpt.data.dataset import TokenWindows
from distgpt.data.sampler import BatchPlan, Sampler
from distgpt.data.token_files import open_token_file
from distgpt.distributed.runtime import RuntimeConfig
from distgpt.generate import next_token_probabilities
from distgpt.models.cross_entropy import full_cross_entropy
from distgpt.models.gpt2 import DecoderLM
from distgpt.optim.optimizers import AdamWConfig
from distgpt.optim.schedules import Schedule, learning_rate
from distgpt.training.step import StepSettings, train_step

N_VOCAB, SEQ_LEN, BATCH_SIZE = 8, 16, 8


def test_learning_rates_are_the_published_ones() -> None:
    schedule = Schedule("cosine", max_lr=0.1, min_lr=0.01, num_warmup_steps=5, num_decay_steps=10)
    rates = [learning_rate(step, schedule) for step in [*range(11), 11, 12, 1000]]
    published = [0, 0.02, 0.04, 0.06, 0.08, 0.1, 0.0914, 0.0689, 0.0411, 0.0186, 0.01, 0.01, 0.01, 0.01]
    np.testing.assert_allclose(rates, published, atol=5e-5)


def test_loss_of_known_logits_is_the_published_one() -> None:
    ids_BT = torch.tensor([[0, 1, 2], [2, 1, 0]])
    logits_PV = torch.tensor([1.0, -2.0, 3.0]).expand(4, 3)  # at every position; the identity as weights keeps them
    loss = full_cross_entropy(logits_PV, torch.eye(3), ids_BT[:, 1:].flatten(), 3) / 4
    assert float(loss) == pytest.approx(3.1328, abs=5e-5)


@pytest.mark.parametrize("temperature", [0.1, 0.5, 1.0, 2.0, 100.0])
def test_softmax_with_temperature_matches_its_definition(temperature: float) -> None:
    logits = [[1.0, -2.0, 3.0], [0.0, 0.0, 0.0]]
    probabilities = next_token_probabilities(torch.tensor(logits), temperature)
    for logits_row, row in zip(logits, probabilities.tolist(), strict=True):
        weights = [math.exp(value / temperature) for value in logits_row]
        assert row == pytest.approx([weight / sum(weights) for weight in weights], rel=1e-5)


def test_temperature_zero_selects_the_largest_logit() -> None:
    assert next_token_probabilities(torch.tensor([[1.0, -2.0, 3.0]]), 0.0).tolist() == [[0.0, 0.0, 1.0]]
    assert next_token_probabilities(torch.tensor([[1.0, -2.0, 3.0]]), 1e-8).tolist() == [[0.0, 0.0, 1.0]]


def train_on(stream: np.ndarray, folder: Path, num_steps: int) -> list[float]:
    """Losses of the exercise's small model on a stream of tokens below 8."""
    np.save(folder / "stream.npy", stream.astype(np.uint16))
    tokens = open_token_file(folder / "stream.npy")["tokens"]
    model = DecoderLM(n_vocab=N_VOCAB, n_embd=16, n_head=8, n_positions=SEQ_LEN, n_layer=2)
    optimizer = AdamWConfig().build(model)
    for group in optimizer.param_groups:
        group["lr"] = 5e-4
    windows = TokenWindows(tokens, SEQ_LEN, N_VOCAB)
    loader = TrainLoader(windows, Sampler(len(windows), 0, BatchPlan(BATCH_SIZE, BATCH_SIZE, 1), 0))
    num_targets = BATCH_SIZE * SEQ_LEN
    settings = StepSettings(num_targets, max_grad_norm=1.0, dp_size=1, runtime=RuntimeConfig("fp32", False, "cpu"))
    results = [train_step(model, optimizer, loader.micro_batches(step), settings) for step in range(num_steps)]
    return [float(result.loss_sum) / num_targets for result in results]


def test_loss_of_random_tokens_stays_at_ln_v(tmp_path: Path) -> None:
    losses = train_on(np.random.default_rng(0).integers(0, 8, 100_000), tmp_path, 300)
    assert np.mean(losses[-50:]) == pytest.approx(math.log(8), abs=0.02)
    assert min(losses) > math.log(8) - 0.1


def test_counting_up_is_learned(tmp_path: Path) -> None:
    losses = train_on(np.arange(100_000) % 8, tmp_path, 300)
    assert losses[0] == pytest.approx(math.log(8), rel=0.02)
    assert losses[-1] < 1.3
