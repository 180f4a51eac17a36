"""What belongs to one step alone; that it computes one gradient on any layout is in test_parallel.py."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from distgpt.config import OptimizerConfig
from distgpt.data import Batch
from distgpt.loss import IGNORED
from distgpt.optim import build_optimizer
from distgpt.parallel import Running
from distgpt.plan import Layout
from distgpt.step import train_step
from tests.ranks import N_VOCAB, SEQ_LEN, results, small_model
from tests.test_exercise import ALONE


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_dropout_differs_by_rank_and_step_and_repeats(ranks: int) -> None:
    found, _ = results(ranks)
    firsts = [tuple(drawn[0]) for drawn in found["dropout"]]
    assert len(set(firsts)) == ranks
    for first, second, again in found["dropout"]:
        assert first == again and first != second


def test_micro_batches_of_unequal_token_counts_weigh_each_token_alike() -> None:
    """17 targets in four micro-batches, one of which has none, against the mean over all of them at once."""
    generator = torch.Generator().manual_seed(0)
    ids_BT, targets_BT = torch.randint(N_VOCAB, (2, 7, SEQ_LEN), generator=generator)
    real_BT = torch.zeros(7, SEQ_LEN, dtype=torch.bool)
    for row, tokens in enumerate((1, 9, 0, 2, 5, 0, 0)):
        real_BT[row, :tokens] = True
    targets_BT[~real_BT] = IGNORED
    expected = small_model().double()
    loss = F.cross_entropy(expected(ids_BT).flatten(0, 1), targets_BT.flatten(), ignore_index=IGNORED)
    loss.backward()
    model = small_model().double()
    batches = [Batch(ids_BT[rows], targets_BT[rows]) for rows in (slice(0, 2), slice(2, 4), slice(4, 5), slice(5, 7))]
    optimizer = build_optimizer(model, OptimizerConfig())
    result = train_step(Running(model, Layout()), optimizer, batches, 17, 1e9, ALONE)
    assert float(result.loss_sum) / 17 == pytest.approx(loss.item(), rel=1e-12)
    for ours, plain in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, plain.grad, rtol=1e-10, atol=1e-14)
