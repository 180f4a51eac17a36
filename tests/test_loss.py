"""The tiled loss is the plain loss: same value, same gradients, whatever the tile."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from distgpt import loss as losses
from distgpt.loss import IGNORED, Tiles, plain_loss, tiled_loss

P, D, N_VOCAB, ROWS = 200, 12, 101, 128


@pytest.fixture(autouse=True)
def few_logits_are_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(losses, "FEW_LOGITS", 0)


def case(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, weights with padding rows, and targets of which some are ignored."""
    generator = torch.Generator().manual_seed(0)
    x_PD = torch.randn(P, D, generator=generator, dtype=dtype).requires_grad_()
    weight_VD = torch.randn(ROWS, D, generator=generator, dtype=dtype)
    weight_VD[N_VOCAB:] = 0
    targets_P = torch.randint(N_VOCAB, (P,), generator=generator)
    targets_P[::7] = IGNORED
    return x_PD, weight_VD.requires_grad_(), targets_P


def gradients(loss: Tensor, *of: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss * 0.37, of))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-12)])
@pytest.mark.parametrize("tile_bytes", [1, 80 * ROWS * 8, 2**30])
@pytest.mark.parametrize("kind", ["plain", "tiled"])
def test_value_and_gradients_are_those_of_autograd(
    monkeypatch: pytest.MonkeyPatch, kind: str, tile_bytes: int, dtype: torch.dtype, tolerance: float
) -> None:
    monkeypatch.setattr(losses, "TILE_BYTES", tile_bytes)
    x_PD, weight_VD, targets_P = case(dtype)
    expected = F.cross_entropy(x_PD @ weight_VD[:N_VOCAB].T, targets_P, ignore_index=IGNORED, reduction="sum")
    if kind == "tiled":
        got = tiled_loss(x_PD, weight_VD, targets_P, N_VOCAB, Tiles())
    else:
        got = plain_loss(x_PD, weight_VD, targets_P, N_VOCAB)
    assert got.dtype == dtype
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=0)
    for ours, theirs in zip(gradients(got, x_PD, weight_VD), gradients(expected, x_PD, weight_VD), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=tolerance * float(theirs.abs().max()))


def test_padding_rows_get_no_gradient_at_all() -> None:
    x_PD, weight_VD, targets_P = case(torch.float32)
    (gradient,) = gradients(tiled_loss(x_PD, weight_VD, targets_P, N_VOCAB, Tiles()), weight_VD)
    assert (gradient[N_VOCAB:] == 0).all() and (gradient[:N_VOCAB] != 0).any(1).all()


def test_without_targets_loss_and_gradients_are_zero() -> None:
    x_PD, weight_VD, targets_P = case(torch.float32)
    loss = tiled_loss(x_PD, weight_VD, torch.full_like(targets_P, IGNORED), N_VOCAB, Tiles())
    assert loss == 0
    assert all((g == 0).all() for g in gradients(loss, x_PD, weight_VD))


@pytest.mark.parametrize("scale", [3, 6, 1000])
def test_large_logits_overflow_neither_the_loss_nor_its_gradient(scale: int) -> None:
    """With losses of up to 75, 150 and 25,000 nats."""
    x_PD, weight_VD, targets_P = case(torch.float32)
    found = tiled_loss(x_PD * scale, weight_VD, targets_P, N_VOCAB, Tiles())
    expected = F.cross_entropy(x_PD * scale @ weight_VD[:N_VOCAB].T, targets_P, ignore_index=IGNORED, reduction="sum")
    torch.testing.assert_close(found, expected)
    for ours, theirs in zip(gradients(found, x_PD, weight_VD), gradients(expected, x_PD, weight_VD), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5 * float(theirs.abs().max()))


def test_bf16_autocast_agrees_within_its_precision() -> None:
    x_PD, weight_VD, targets_P = case(torch.float32)
    expected = plain_loss(x_PD, weight_VD, targets_P, N_VOCAB)
    with torch.autocast("cpu", torch.bfloat16):
        got = tiled_loss(x_PD, weight_VD, targets_P, N_VOCAB, Tiles())
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, expected, rtol=5e-3, atol=0)
    for ours, theirs in zip(gradients(got, x_PD, weight_VD), gradients(expected, x_PD, weight_VD), strict=True):
        assert ours.dtype == torch.float32
        assert (ours - theirs).norm() < 1e-2 * theirs.norm()


def test_scoring_alone_needs_no_gradient() -> None:
    x_PD, weight_VD, targets_P = case(torch.float32)
    with torch.no_grad():
        loss = tiled_loss(x_PD, weight_VD, targets_P, N_VOCAB, Tiles())
    assert not loss.requires_grad
    torch.testing.assert_close(loss, plain_loss(x_PD, weight_VD, targets_P, N_VOCAB).detach())


def test_a_second_backward_through_the_tiled_loss_is_refused() -> None:
    """Its gradients are scaled in place: used again they would be wrong."""
    x_PD, weight_VD, targets_P = case(torch.float32)
    loss = tiled_loss(x_PD, weight_VD, targets_P, N_VOCAB, Tiles())
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_few_logits_go_the_plain_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(losses, "FEW_LOGITS", P * ROWS + 1)
    tiles = Tiles()
    assert tiled_loss(*case(torch.float32), N_VOCAB, tiles) == plain_loss(*case(torch.float32), N_VOCAB)
    assert tiles.kept is None
