"""The decoder is GPT-2's: against a naive one, against closed forms, and in what it must never see."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from distgpt.config import ModelConfig
from distgpt.model import DecoderLM, KeyValueCache, attend_by_matmuls

SIZES = ModelConfig(n_embd=24, n_head=3, n_positions=20, n_layer=2)
N_VOCAB = 101


def model(seed: int = 1, p_dropout: float = 0.0, end_of_text: int | None = None) -> DecoderLM:
    sizes = SIZES.n_embd, SIZES.n_head, SIZES.n_positions, SIZES.n_layer
    built = DecoderLM(N_VOCAB, *sizes, p_dropout, seed, end_of_text)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():  # weights that matter: at initialisation, all logits are nearly alike
        for parameter in built.parameters():
            if parameter.ndim == 2:
                parameter.mul_(8)
            else:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return built


def ids(*shape: int) -> Tensor:
    return torch.randint(N_VOCAB, shape, generator=torch.Generator().manual_seed(5))


def naive_logits(m: DecoderLM, sequence: Tensor) -> Tensor:
    """GPT-2 written out for one sequence: a loop over heads, a masked softmax, every formula spelled."""
    w = dict(m.named_parameters())

    def linear(name: str, x: Tensor) -> Tensor:
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def norm(name: str, x: Tensor) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        variance = (centred**2).mean(-1, keepdim=True)
        return centred / torch.sqrt(variance + 1e-5) * w[f"{name}.weight"] + w[f"{name}.bias"]

    def gelu(x: Tensor) -> Tensor:
        return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))

    T, H = len(sequence), SIZES.n_embd // SIZES.n_head
    x = w["token_embedding.weight"][sequence] + w["position_embedding.weight"][:T]
    for layer in range(SIZES.n_layer):
        block = f"blocks.{layer}"
        q, k, v = linear(f"{block}.attention.qkv", norm(f"{block}.attention_norm", x)).split(SIZES.n_embd, dim=-1)
        heads = []
        for head in range(SIZES.n_head):
            part = slice(head * H, (head + 1) * H)
            scores = q[:, part] @ k[:, part].T / math.sqrt(H)
            scores = scores.masked_fill(torch.ones(T, T).triu(1).bool(), -math.inf)
            heads.append(scores.softmax(-1) @ v[:, part])
        x = x + linear(f"{block}.attention.out", torch.cat(heads, -1))
        x = x + linear(f"{block}.mlp_down", gelu(linear(f"{block}.mlp_up", norm(f"{block}.mlp_norm", x))))
    return norm("final_norm", x) @ w["token_embedding.weight"][:N_VOCAB].T


def test_logits_are_those_of_gpt2_written_out() -> None:
    m, batch = model().double(), ids(3, 20)
    got = m(batch)
    assert got.shape == (3, 20, N_VOCAB)
    for row in range(3):
        torch.testing.assert_close(got[row], naive_logits(m, batch[row]), rtol=1e-10, atol=1e-10)


def test_loss_is_the_sum_of_cross_entropies() -> None:
    m, batch = model(), ids(3, 20)
    targets = ids(3, 20).flip(0).clone()
    targets[0, :5] = -100
    expected = F.cross_entropy(m(batch).flatten(0, 1), targets.flatten(), reduction="sum")
    torch.testing.assert_close(m(batch, targets_BT=targets), expected)


@pytest.mark.parametrize("t", [0, 7, 19])
def test_a_token_changes_no_logit_before_it(t: int) -> None:
    m, batch = model(), ids(2, 20)
    other = batch.clone()
    other[:, t] = (other[:, t] + 1) % N_VOCAB
    before, after = m(batch), m(other)
    assert torch.equal(before[:, :t], after[:, :t])
    assert (before[:, t:] != after[:, t:]).any(-1).all()


@pytest.mark.parametrize("padding", [1, 5, 13])
def test_left_padding_changes_nothing_for_the_real_tokens(padding: int) -> None:
    m, sequence = model(), ids(1, 7)
    garbage = torch.full((1, padding), 50)
    padded = torch.cat([garbage, sequence], 1)
    mask = torch.cat([torch.zeros(1, padding), torch.ones(1, 7)], 1).long()
    torch.testing.assert_close(m(padded, mask)[:, padding:], m(sequence), rtol=1e-5, atol=1e-5)
    assert torch.isfinite(m(padded, mask)).all()


def test_reading_with_a_cache_is_reading_at_once() -> None:
    m, batch = model().eval(), ids(2, 12)
    mask = torch.ones(2, 12).long()
    mask[0, :4] = 0
    whole = m(batch, mask)
    cache = KeyValueCache(2, 12)
    pieces = [m(batch[:, a:b], mask[:, :b], cache=cache) for a, b in ((0, 6), (6, 7), (7, 12))]
    torch.testing.assert_close(torch.cat(pieces, 1)[:, 4:], whole[:, 4:], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("n_vocab", [64, 101, 50257])
def test_parameters_are_counted_in_closed_form(n_vocab: int) -> None:
    m = DecoderLM(n_vocab, SIZES.n_embd, SIZES.n_head, SIZES.n_positions, SIZES.n_layer)
    trained = sum(weight.numel() for weight in m.without_padding(m.state_dict()).values())
    assert trained == SIZES.sizes(n_vocab).parameters
    padding = (len(m.token_embedding.weight) - n_vocab) * SIZES.n_embd
    assert sum(p.numel() for p in m.parameters()) == trained + padding
    assert len(m.token_embedding.weight) % 64 == 0


def test_flops_are_those_that_torch_counts() -> None:
    sizes, n_vocab, T = ModelConfig(n_embd=32, n_head=2, n_positions=128, n_layer=2), 1024, 128
    m = DecoderLM(n_vocab, sizes.n_embd, sizes.n_head, sizes.n_positions, sizes.n_layer)
    batch = torch.randint(n_vocab, (3, T))
    counter = FlopCounterMode(display=False)
    with sdpa_kernel(SDPBackend.MATH), counter:
        m(batch, targets_BT=batch).backward()
    assert counter.get_total_flops() == 3 * T * sizes.sizes(n_vocab).flops_per_token(T)


def test_gpt_tiny_costs_what_the_exercise_says() -> None:
    sizes = ModelConfig(n_embd=32, n_head=2, n_positions=128, n_layer=2)
    assert sizes.sizes(50257).flops_per_token(128) == 9_895_104


def test_a_new_model_guesses_evenly() -> None:
    m = DecoderLM(N_VOCAB, 24, 3, 20, 2)
    loss = m(ids(4, 20), targets_BT=ids(4, 20).roll(1, 0)) / 80
    assert float(loss.detach()) == pytest.approx(math.log(N_VOCAB), rel=0.02)


def test_weights_start_as_gpt2s() -> None:
    m = DecoderLM(5000, 128, 4, 64, 8)
    for name, parameter in m.named_parameters():
        if name.endswith("bias"):
            assert (parameter == 0).all()
        elif "norm" in name:
            assert (parameter == 1).all()
        else:
            trained = m.without_padding(m.state_dict())[name]
            std = 0.02 / math.sqrt(16) if name.endswith(("out.weight", "mlp_down.weight")) else 0.02
            assert float(trained.std()) == pytest.approx(std, rel=0.05), name
            assert abs(float(trained.mean())) < std / 20, name


def test_initial_weights_depend_on_seed_and_name_alone() -> None:
    one, same, other = (DecoderLM(N_VOCAB, 24, 3, 20, 2, seed=seed).state_dict() for seed in (4, 4, 5))
    deeper = DecoderLM(N_VOCAB, 24, 3, 20, 3, seed=4).state_dict()
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not torch.equal(one["token_embedding.weight"], other["token_embedding.weight"])
    assert not torch.equal(one["blocks.0.mlp_up.weight"], one["blocks.1.mlp_up.weight"])
    assert torch.equal(one["blocks.1.mlp_up.weight"], deeper["blocks.1.mlp_up.weight"])


def test_the_embedding_is_tied_to_the_head() -> None:
    m, batch = model(), ids(1, 5)
    m(batch, targets_BT=batch).backward()
    gradient = m.token_embedding.weight.grad
    assert gradient is not None
    unread = sorted(set(range(N_VOCAB)) - set(batch.flatten().tolist()))
    assert (gradient[unread] != 0).any()  # only the head can have reached these rows
    assert not any("head" in name for name, _ in m.named_parameters())


def test_dropout_acts_in_training_only() -> None:
    m, batch = model(p_dropout=0.5), ids(2, 20)
    m.train()
    assert not torch.equal(m(batch), m(batch))
    m.eval()
    assert torch.equal(m(batch), m(batch))


def test_attention_by_matmuls_is_fused_attention() -> None:
    q_BNTH, k_BNTH, v_BNTH = torch.randn(3, 2, 3, 17, 8, dtype=torch.float64)
    fused = F.scaled_dot_product_attention(q_BNTH, k_BNTH, v_BNTH, is_causal=True)
    by_matmuls = attend_by_matmuls(q_BNTH, k_BNTH, v_BNTH, 0.0)
    torch.testing.assert_close(by_matmuls, fused, rtol=0, atol=1e-6)  # its softmax is in fp32
