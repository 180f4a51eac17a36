"""Attention within documents equals running each document separately: whole, padded, cached and generated."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from distgpt.generate import Sampling, generate, prompt_generators
from distgpt.models.document_mask import index_documents
from distgpt.models.gpt2 import DecoderLM
from distgpt.models.kv_cache import KVCache
from tests.test_gpt2 import N_VOCAB, SIZES, model

END = 7
T = SIZES.n_positions


def batch(rows: int, chance: float, seed: int = 0) -> Tensor:
    """Rows of random ids, some of which begin a document."""
    generator = np.random.default_rng(seed)
    ids = generator.integers(8, N_VOCAB, (rows, T))
    return torch.from_numpy(np.where(generator.random((rows, T)) < chance, END, ids))


def separately(m: DecoderLM, ids_T: Tensor) -> Tensor:
    """Logits of a sequence whose documents are run one by one, by a model without document masks."""
    starts = [t for t in range(len(ids_T)) if t == 0 or ids_T[t] == END]
    ends = [*starts[1:], len(ids_T)]
    return torch.cat([m(ids_T[None, start:end])[0] for start, end in zip(starts, ends, strict=True)])


@pytest.mark.parametrize("chance", [0.0, 0.05, 0.3, 1.0])
def test_logits_are_those_of_separate_documents(chance: float) -> None:
    masked, plain = model(end_of_text=END).double(), model().double()
    ids_BT = batch(6, chance)
    expected = torch.stack([separately(plain, ids_T) for ids_T in ids_BT])
    torch.testing.assert_close(masked(ids_BT), expected, rtol=0, atol=1e-12)
    documents = index_documents(ids_BT, END)
    torch.testing.assert_close(masked(ids_BT, documents=documents), expected, rtol=0, atol=1e-12)


def test_every_position_is_indexed_once_with_little_padding() -> None:
    for seed in range(20):
        ids_BT = batch(4, 0.2, seed)
        documents = index_documents(ids_BT, END)
        rows = torch.cat([group.flatten() for group in documents.groups])
        assert rows[documents.inverse_P].tolist() == list(range(ids_BT.numel()))
        assert sum(group.numel() for group in documents.groups) < 2 * ids_BT.numel()


def test_padded_and_cached_logits_are_those_of_separate_documents() -> None:
    masked, plain = model(end_of_text=END).double(), model().double()
    rows = [row[:length].tolist() for row, length in zip(batch(4, 0.2, 3), (3, 12, 8, 16), strict=True)]
    longest = max(map(len, rows))
    ids_BT = torch.tensor([[END] * (longest - len(row)) + row for row in rows])  # as generation pads
    non_pad_BT = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    cache = KVCache(len(rows), T)
    prefill = masked(ids_BT, non_pad_BT, cache=cache)
    next_B1 = torch.tensor([[11], [END], [12], [13]])
    non_pad_BS = torch.cat([non_pad_BT, torch.ones(4, 1, dtype=torch.int64)], 1)
    step = masked(next_B1, non_pad_BS, cache=cache)
    for index, row in enumerate(rows):
        expected = separately(plain, torch.tensor(row + next_B1[index].tolist()))
        torch.testing.assert_close(prefill[index, -len(row) :], expected[:-1], rtol=0, atol=1e-12)
        torch.testing.assert_close(step[index, 0], expected[-1], rtol=0, atol=1e-12)


def test_a_prompt_of_two_documents_is_continued_like_its_last() -> None:
    masked, plain = model(end_of_text=END).eval(), model().eval()
    last = [END, 20, 30]
    settings = N_VOCAB - 1, 8, Sampling(temperature=0), prompt_generators([last], 0)
    (expected,), _ = generate(plain, [last], *settings)
    (continuation,), _ = generate(masked, [[9, 8, 50, *last]], *settings)
    assert continuation == expected != []
    (unmasked,), _ = generate(plain, [[9, 8, 50, *last]], *settings)
    assert unmasked != expected


def test_long_contexts_need_no_square_mask() -> None:
    long = 4096
    m = DecoderLM(N_VOCAB, 16, 1, long, 1, end_of_text=END)
    ids_BT = torch.from_numpy(np.where(np.arange(long) % 512 == 0, END, 9))[None]
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        m(ids_BT, targets=ids_BT.roll(-1, 1)).backward()
    largest = max(event.self_cpu_memory_usage for event in profiled.events() or [])
    assert 0 < largest < long * long  # bytes: not even one bit-per-entry mask of bools
