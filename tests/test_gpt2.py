"""The decoder is GPT-2: compared with a naive implementation and closed forms, and causal."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from distgpt.models.architectures import GPT2Config
from distgpt.models.attention_kernels import matmul_attention
from distgpt.models.gpt2 import GELU, DecoderLM
from distgpt.models.kernels import Kernels
from distgpt.models.kv_cache import KVCache

SIZES = GPT2Config(n_embd=24, n_head=3, n_positions=20, n_layer=2)
N_VOCAB = 101


def model(seed: int = 1, p_dropout: float = 0.0, end_of_text: int | None = None) -> DecoderLM:
    sizes = SIZES.n_embd, SIZES.n_head, SIZES.n_positions, SIZES.n_layer
    built = DecoderLM(N_VOCAB, *sizes, p_dropout, seed=seed, end_of_text=end_of_text)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():  # larger weights: at initialization, all logits are nearly equal
        for parameter in built.parameters():
            if parameter.ndim == 2:
                parameter.mul_(8)
            else:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return built


def ids(*shape: int) -> Tensor:
    return torch.randint(N_VOCAB, shape, generator=torch.Generator().manual_seed(5))


def naive_logits(m: DecoderLM, sequence: Tensor) -> Tensor:
    """GPT-2 written out for one sequence: a loop over heads, a masked softmax, every formula spelled out."""
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


def test_logits_equal_those_of_a_naive_gpt2() -> None:
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
    torch.testing.assert_close(m(batch, targets=targets), expected)


@pytest.mark.parametrize("t", [0, 7, 19])
def test_a_token_changes_no_earlier_logit(t: int) -> None:
    m, batch = model(), ids(2, 20)
    other = batch.clone()
    other[:, t] = (other[:, t] + 1) % N_VOCAB
    before, after = m(batch), m(other)
    assert torch.equal(before[:, :t], after[:, :t])
    assert (before[:, t:] != after[:, t:]).any(-1).all()


@pytest.mark.parametrize("padding", [1, 5, 13])
def test_left_padding_changes_no_logit_of_a_token(padding: int) -> None:
    m, sequence = model(), ids(1, 7)
    padding_ids = torch.full((1, padding), 50)
    padded = torch.cat([padding_ids, sequence], 1)
    mask = torch.cat([torch.zeros(1, padding), torch.ones(1, 7)], 1).long()
    torch.testing.assert_close(m(padded, mask)[:, padding:], m(sequence), rtol=1e-5, atol=1e-5)
    assert torch.isfinite(m(padded, mask)).all()


def test_a_kv_cache_gives_the_logits_of_one_pass() -> None:
    m, batch = model().eval(), ids(2, 12)
    mask = torch.ones(2, 12).long()
    mask[0, :4] = 0
    at_once = m(batch, mask)
    cache = KVCache(2, 12)
    pieces = [m(batch[:, a:b], mask[:, :b], cache=cache) for a, b in ((0, 6), (6, 7), (7, 12))]
    torch.testing.assert_close(torch.cat(pieces, 1)[:, 4:], at_once[:, 4:], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("n_vocab", [64, 101, 50257])
def test_the_number_of_parameters_is_the_closed_form(n_vocab: int) -> None:
    m = DecoderLM(n_vocab, SIZES.n_embd, SIZES.n_head, SIZES.n_positions, SIZES.n_layer)
    num_trained = sum(weight.numel() for weight in m.remove_vocab_padding(m.state_dict()).values())
    assert num_trained == SIZES.num_parameters(n_vocab)
    padding = (len(m.token_embedding.weight) - n_vocab) * SIZES.n_embd
    assert sum(p.numel() for p in m.parameters()) == num_trained + padding
    assert len(m.token_embedding.weight) % 64 == 0


def test_flops_equal_torchs_count() -> None:
    sizes, n_vocab, T = GPT2Config(n_embd=32, n_head=2, n_positions=128, n_layer=2), 1024, 128
    m = DecoderLM(n_vocab, sizes.n_embd, sizes.n_head, sizes.n_positions, sizes.n_layer)
    batch = torch.randint(n_vocab, (3, T))
    counter = FlopCounterMode(display=False)
    with sdpa_kernel(SDPBackend.MATH), counter:
        m(batch, targets=batch).backward()
    assert counter.get_total_flops() == 3 * T * sizes.flops_per_token(n_vocab, T)


def test_gpt_tiny_needs_the_flops_that_the_exercise_states() -> None:
    sizes = GPT2Config(n_embd=32, n_head=2, n_positions=128, n_layer=2)
    assert sizes.flops_per_token(50257, 128) == 9_895_104


def test_a_new_model_predicts_uniformly() -> None:
    m = DecoderLM(N_VOCAB, 24, 3, 20, 2)
    loss = m(ids(4, 20), targets=ids(4, 20).roll(1, 0)) / 80
    assert float(loss.detach()) == pytest.approx(math.log(N_VOCAB), rel=0.02)


def test_initial_weights_have_gpt2s_distribution() -> None:
    m = DecoderLM(5000, 128, 4, 64, 8)
    for name, parameter in m.named_parameters():
        if name.endswith("bias"):
            assert (parameter == 0).all()
        elif "norm" in name:
            assert (parameter == 1).all()
        else:
            values = m.remove_vocab_padding(m.state_dict())[name]
            std = 0.02 / math.sqrt(16) if name.endswith(("out.weight", "mlp_down.weight")) else 0.02
            assert float(values.std()) == pytest.approx(std, rel=0.05), name
            assert abs(float(values.mean())) < std / 20, name


def test_initial_weights_depend_on_seed_and_name_alone() -> None:
    one, same, other = (DecoderLM(N_VOCAB, 24, 3, 20, 2, seed=seed).state_dict() for seed in (4, 4, 5))
    deeper = DecoderLM(N_VOCAB, 24, 3, 20, 3, seed=4).state_dict()
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not torch.equal(one["token_embedding.weight"], other["token_embedding.weight"])
    assert not torch.equal(one["blocks.0.mlp_up.weight"], one["blocks.1.mlp_up.weight"])
    assert torch.equal(one["blocks.1.mlp_up.weight"], deeper["blocks.1.mlp_up.weight"])


def test_the_embedding_is_tied_to_the_head() -> None:
    m, batch = model(), ids(1, 5)
    m(batch, targets=batch).backward()
    gradient = m.token_embedding.weight.grad
    assert gradient is not None
    unused = sorted(set(range(N_VOCAB)) - set(batch.flatten().tolist()))
    assert (gradient[unused] != 0).any()  # only the head can have reached these rows
    assert not any("head" in name for name, _ in m.named_parameters())


def test_dropout_acts_in_training_only() -> None:
    m, batch = model(p_dropout=0.5), ids(2, 20)
    m.train()
    assert not torch.equal(m(batch), m(batch))
    m.eval()
    assert torch.equal(m(batch), m(batch))


def test_matmul_attention_equals_fused_attention() -> None:
    q_BNTH, k_BNTH, v_BNTH = torch.randn(3, 2, 3, 17, 8, dtype=torch.float64)
    fused = F.scaled_dot_product_attention(q_BNTH, k_BNTH, v_BNTH, is_causal=True)
    explicit = matmul_attention(q_BNTH, k_BNTH, v_BNTH, None, 0.0)
    torch.testing.assert_close(explicit, fused, rtol=0, atol=1e-6)  # its softmax is in fp32


def test_both_forms_of_gelu_are_one_function() -> None:
    x = torch.linspace(-6, 6, 1001, dtype=torch.float64)
    torch.testing.assert_close(GELU["sigmoid"](x), GELU["tanh"](x), rtol=0, atol=1e-12)


@pytest.mark.parametrize("attention", ["sdpa", "sdpa-fp32", "matmul"])
@pytest.mark.parametrize("cross_entropy", ["full", "chunked"])
def test_every_kernel_computes_the_same_loss(attention: str, cross_entropy: str) -> None:
    batch = ids(3, 20)
    sizes = N_VOCAB, 24, 3, 20, 2
    kernels = Kernels(attention, "sigmoid", cross_entropy)
    loss = DecoderLM(*sizes, seed=1, kernels=kernels)(batch, targets=batch)
    torch.testing.assert_close(loss, DecoderLM(*sizes, seed=1)(batch, targets=batch), rtol=1e-6, atol=0)
