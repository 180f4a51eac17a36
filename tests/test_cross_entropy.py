"""The chunked cross-entropy has the value and the gradients of the full one, whatever the chunk size."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from distgpt.models import cross_entropy
from distgpt.models.cross_entropy import IGNORE_INDEX, ChunkedCrossEntropy, full_cross_entropy

P, D, N_VOCAB, ROWS = 200, 12, 101, 128


@pytest.fixture(autouse=True)
def chunk_even_small_cases(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cross_entropy, "MIN_CHUNKED_LOGITS", 0)


def case(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, weights with padding rows, and targets of which some are ignored."""
    generator = torch.Generator().manual_seed(0)
    x_PD = torch.randn(P, D, generator=generator, dtype=dtype).requires_grad_()
    weight_VD = torch.randn(ROWS, D, generator=generator, dtype=dtype)
    weight_VD[N_VOCAB:] = 0
    targets_P = torch.randint(N_VOCAB, (P,), generator=generator)
    targets_P[::7] = IGNORE_INDEX
    return x_PD, weight_VD.requires_grad_(), targets_P


def gradients(loss: Tensor, *of: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss * 0.37, of))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-12)])
@pytest.mark.parametrize("chunk_bytes", [1, 80 * ROWS * 8, 2**30])
@pytest.mark.parametrize("kind", ["full", "chunked"])
def test_value_and_gradients_equal_autograds(
    monkeypatch: pytest.MonkeyPatch, kind: str, chunk_bytes: int, dtype: torch.dtype, tolerance: float
) -> None:
    monkeypatch.setattr(cross_entropy, "CHUNK_BYTES", chunk_bytes)
    x_PD, weight_VD, targets_P = case(dtype)
    expected = F.cross_entropy(x_PD @ weight_VD[:N_VOCAB].T, targets_P, ignore_index=IGNORE_INDEX, reduction="sum")
    if kind == "chunked":
        got = ChunkedCrossEntropy()(x_PD, weight_VD, targets_P, N_VOCAB)
    else:
        got = full_cross_entropy(x_PD, weight_VD, targets_P, N_VOCAB)
    assert got.dtype == dtype
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=0)
    for actual, reference in zip(gradients(got, x_PD, weight_VD), gradients(expected, x_PD, weight_VD), strict=True):
        torch.testing.assert_close(actual, reference, rtol=0, atol=tolerance * float(reference.abs().max()))


def test_padding_rows_get_no_gradient() -> None:
    x_PD, weight_VD, targets_P = case(torch.float32)
    (gradient,) = gradients(ChunkedCrossEntropy()(x_PD, weight_VD, targets_P, N_VOCAB), weight_VD)
    assert (gradient[N_VOCAB:] == 0).all() and (gradient[:N_VOCAB] != 0).any(1).all()


def test_without_targets_loss_and_gradients_are_zero() -> None:
    x_PD, weight_VD, targets_P = case(torch.float32)
    loss = ChunkedCrossEntropy()(x_PD, weight_VD, torch.full_like(targets_P, IGNORE_INDEX), N_VOCAB)
    assert loss == 0
    assert all((g == 0).all() for g in gradients(loss, x_PD, weight_VD))


@pytest.mark.parametrize("scale", [3, 6, 1000])
def test_large_logits_overflow_neither_loss_nor_gradient(scale: int) -> None:
    """With losses of up to 75, 150 and 25,000 nats."""
    x_PD, weight_VD, targets_P = case(torch.float32)
    got = ChunkedCrossEntropy()(x_PD * scale, weight_VD, targets_P, N_VOCAB)
    expected = F.cross_entropy(
        x_PD * scale @ weight_VD[:N_VOCAB].T, targets_P, ignore_index=IGNORE_INDEX, reduction="sum"
    )
    torch.testing.assert_close(got, expected)
    for actual, reference in zip(gradients(got, x_PD, weight_VD), gradients(expected, x_PD, weight_VD), strict=True):
        torch.testing.assert_close(actual, reference, rtol=0, atol=1e-5 * float(reference.abs().max()))


def test_bf16_autocast_agrees_within_bf16_precision() -> None:
    x_PD, weight_VD, targets_P = case(torch.float32)
    expected = full_cross_entropy(x_PD, weight_VD, targets_P, N_VOCAB)
    with torch.autocast("cpu", torch.bfloat16):
        got = ChunkedCrossEntropy()(x_PD, weight_VD, targets_P, N_VOCAB)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, expected, rtol=5e-3, atol=0)
    for actual, reference in zip(gradients(got, x_PD, weight_VD), gradients(expected, x_PD, weight_VD), strict=True):
        assert actual.dtype == torch.float32
        assert (actual - reference).norm() < 1e-2 * reference.norm()


def test_without_grad_mode_no_gradient_is_computed() -> None:
    x_PD, weight_VD, targets_P = case(torch.float32)
    with torch.no_grad():
        loss = ChunkedCrossEntropy()(x_PD, weight_VD, targets_P, N_VOCAB)
    assert not loss.requires_grad
    torch.testing.assert_close(loss, full_cross_entropy(x_PD, weight_VD, targets_P, N_VOCAB).detach())


def test_a_second_backward_through_the_chunked_loss_is_refused() -> None:
    """Its gradients are scaled in place: used again they would be wrong."""
    x_PD, weight_VD, targets_P = case(torch.float32)
    loss = ChunkedCrossEntropy()(x_PD, weight_VD, targets_P, N_VOCAB)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_few_logits_are_computed_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cross_entropy, "MIN_CHUNKED_LOGITS", P * ROWS + 1)
    chunked = ChunkedCrossEntropy()
    assert chunked(*case(torch.float32), N_VOCAB) == full_cross_entropy(*case(torch.float32), N_VOCAB)
    assert chunked._buffers is None
