"""The step computes one gradient, whatever the ranks and the accumulation."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from distgpt.config import BatchPlan
from distgpt.data import ShuffledReader
from tests.ranks import N_VOCAB, SEQ_LEN, SEQUENCES, results, small_model, stream

RANKS = [1, 2, 3, 4]
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}


@pytest.fixture(scope="module", params=list(TOLERANCE), ids=str)
def reference(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[torch.dtype, dict[str, np.ndarray], float]:
    """Loss and gradients of step 5 by plain autograd over the whole batch, with none of the project's step."""
    dtype = request.param
    model = small_model().to(dtype)
    reader = ShuffledReader(
        stream(tmp_path_factory.mktemp("stream"), 999), N_VOCAB, SEQ_LEN, 0, BatchPlan(SEQUENCES, SEQUENCES, 1), 0
    )
    (batch,) = reader.at(5)
    logits = model(batch.ids_BT)
    loss = F.cross_entropy(logits.flatten(0, 1), batch.targets_BT.flatten())
    loss.backward()
    return dtype, {name: p.grad.numpy() for name, p in model.named_parameters() if p.grad is not None}, loss.item()


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("batch_size", [8, 3, 1])
def test_every_layout_gives_the_gradient_of_one_plain_batch(
    reference: tuple[torch.dtype, dict[str, np.ndarray], float], ranks: int, batch_size: int
) -> None:
    dtype, expected, loss = reference
    found, folder = results(ranks)
    norm = np.sqrt(sum((g.astype(np.float64) ** 2).sum() for g in expected.values()))
    for rank in range(ranks):
        row = found["gradients"][rank][f"{batch_size}-{dtype}"]
        assert row["loss"] == pytest.approx(loss, rel=TOLERANCE[dtype])
        assert row["norm"] == pytest.approx(norm, rel=TOLERANCE[dtype])
        with np.load(folder / f"gradients-{batch_size}-{dtype}-{rank}.npz") as got:
            assert set(got) == set(expected)
            for name, gradient in expected.items():
                scale = np.abs(gradient).max()
                np.testing.assert_allclose(got[name], gradient, rtol=0, atol=TOLERANCE[dtype] * scale, err_msg=name)


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_one_all_reduce_per_bucket_and_update_however_many_micro_steps(ranks: int) -> None:
    found, _ = results(ranks)
    for counted in found["reductions"]:
        assert counted["micro_steps"] == 3
        assert counted["buckets"] > 1
        assert counted["per_update"] == [counted["buckets"]] * 3


@pytest.mark.parametrize("ranks", RANKS)
def test_a_nan_gradient_on_one_rank_leaves_all_weights_as_they_are(ranks: int) -> None:
    found, _ = results(ranks)
    for seen in found["nan_gradient"]:
        assert seen["after"] == seen["before"]
        assert np.isfinite(seen["later"]) and seen["later"] != seen["before"]


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_dropout_differs_by_rank_and_step_and_repeats(ranks: int) -> None:
    found, _ = results(ranks)
    firsts = [tuple(drawn[0]) for drawn in found["dropout"]]
    assert len(set(firsts)) == ranks
    for first, second, again in found["dropout"]:
        assert first == again and first != second
