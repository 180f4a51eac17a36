"""What concerns one step alone; test_parallel.py compares its gradient on every layout."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from distgpt.data.dataloader import Batch
from distgpt.distributed.runtime import RuntimeConfig
from distgpt.models.cross_entropy import IGNORE_INDEX
from distgpt.optim.optimizers import AdamWConfig
from distgpt.training.step import StepSettings, train_step
from tests.ranks import N_VOCAB, SEQ_LEN, results, small_model


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_dropout_differs_by_rank_and_step_and_is_reproducible(ranks: int) -> None:
    by_rank, _ = results(ranks)
    first_steps = [tuple(numbers[0]) for numbers in by_rank["dropout"]]
    assert len(set(first_steps)) == ranks
    for first, second, first_again in by_rank["dropout"]:
        assert first == first_again and first != second


def test_every_token_weighs_the_same_in_micro_batches_of_unequal_size() -> None:
    """17 targets in four micro-batches, one of which has none, against the mean over all of them at once."""
    generator = torch.Generator().manual_seed(0)
    ids_BT, targets_BT = torch.randint(N_VOCAB, (2, 7, SEQ_LEN), generator=generator)
    has_target_BT = torch.zeros(7, SEQ_LEN, dtype=torch.bool)
    for row, num_targets in enumerate((1, 9, 0, 2, 5, 0, 0)):
        has_target_BT[row, :num_targets] = True
    targets_BT[~has_target_BT] = IGNORE_INDEX
    reference = small_model().double()
    loss = F.cross_entropy(reference(ids_BT).flatten(0, 1), targets_BT.flatten(), ignore_index=IGNORE_INDEX)
    loss.backward()
    model = small_model().double()
    batches = [Batch(ids_BT[rows], targets_BT[rows]) for rows in (slice(0, 2), slice(2, 4), slice(4, 5), slice(5, 7))]
    settings = StepSettings(17, 1e9, 1, RuntimeConfig("fp32", False, "cpu"))
    result = train_step(model, AdamWConfig().build(model), batches, settings)
    assert float(result.loss_sum) / 17 == pytest.approx(loss.item(), rel=1e-12)
    for parameter, expected in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, expected.grad, rtol=1e-10, atol=1e-14)
