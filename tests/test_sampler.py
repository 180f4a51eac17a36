"""Order is arithmetic: every window once per epoch, identical at any number of ranks, from the step number alone."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from distgpt.data import sampler
from distgpt.data.sampler import BatchPlan, Sampler, permute


def make_sampler(num_windows: int, G: int, dp_size: int = 1, dp_rank: int = 0, seed: int = 0) -> Sampler:
    return Sampler(num_windows, seed, BatchPlan(G, 4, dp_size), dp_rank)


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 16, 17, 100, 1023, 1025, 5000])
def test_permute_is_a_permutation(size: int) -> None:
    for key in ("0/0", "0/1", "7/0"):
        assert sorted(permute(np.arange(size), size, key)) == list(range(size))


def test_permute_works_for_sizes_larger_than_memory() -> None:
    size = 10**12 + 39
    indices = np.arange(0, size, size // 1000)
    permuted = permute(indices, size, "0/0")
    assert permuted.min() >= 0 and permuted.max() < size and len(set(permuted.tolist())) == len(indices)
    # Evenly spread: a tenth of the range gets about a tenth of 1,001 (4 standard deviations: 38).
    counts = np.bincount((permuted // (size // 10)).clip(max=9), minlength=10)
    assert abs(counts - 100.1).max() < 38


def test_permutation_looks_random() -> None:
    n = 2000
    orders = np.stack([permute(np.arange(n), n, f"0/{epoch}") for epoch in range(40)])
    # Neighbors are separated, windows move between epochs, and no position prefers a window.
    assert (np.abs(np.diff(orders)) == 1).mean() < 0.005
    assert (orders[1:] == orders[:-1]).mean() < 0.005
    assert abs(np.corrcoef(np.arange(n), orders[0])[0, 1]) < 0.1
    assert abs(orders.mean(0).mean() - (n - 1) / 2) < 1e-9 and orders.mean(0).std() < 1.3 * n / np.sqrt(12 * 40)


@pytest.mark.parametrize("dp_size", [1, 2, 3, 4])
@pytest.mark.parametrize(("num_windows", "G"), [(20, 4), (17, 5), (7, 7), (10, 3)])
def test_every_window_is_read_once_per_epoch_over_all_ranks(dp_size: int, num_windows: int, G: int) -> None:
    samplers = [make_sampler(num_windows, G, dp_size, dp_rank) for dp_rank in range(dp_size)]
    steps = 3 * num_windows  # a multiple of the epoch: 3 G epochs
    counts = Counter(int(w) for step in range(steps) for s in samplers for w in s.windows_at_step(step))
    assert counts == dict.fromkeys(range(num_windows), 3 * G)
    epochs = [np.arange(epoch * num_windows, (epoch + 1) * num_windows) for epoch in range(3)]
    for positions in epochs:
        assert np.sort(samplers[0].window_ids(positions)).tolist() == list(range(num_windows))


@pytest.mark.parametrize("dp_size", [2, 3, 4])
def test_any_number_of_ranks_reads_the_same_sequences_at_a_step(dp_size: int) -> None:
    single = make_sampler(50, 8)
    samplers = [make_sampler(50, 8, dp_size, dp_rank) for dp_rank in range(dp_size)]
    for step in (0, 3, 6, 7, 1000):
        windows = np.empty(8, dtype=np.int64)
        for dp_rank, rank_sampler in enumerate(samplers):
            windows[dp_rank::dp_size] = rank_sampler.windows_at_step(step)
            np.testing.assert_array_equal(
                rank_sampler.windows_at_step(step, all_ranks=True), single.windows_at_step(step)
            )
        np.testing.assert_array_equal(windows, single.windows_at_step(step))


def test_seeds_and_epochs_change_the_order() -> None:
    first = make_sampler(50, 50)
    other = make_sampler(50, 50, seed=1)
    assert first.windows_at_step(0).tolist() != other.windows_at_step(0).tolist()
    assert first.windows_at_step(0).tolist() != first.windows_at_step(1).tolist()


def test_bit_mixing_changes_about_half_of_all_bits() -> None:
    zeros = np.zeros(64, dtype=np.uint64)
    single_bits = np.uint64(1) << np.arange(64, dtype=np.uint64)
    flipped = sampler._mix_bits(single_bits) ^ sampler._mix_bits(zeros)
    changed_bits = np.array([int(word).bit_count() for word in flipped])
    assert changed_bits.min() > 16 and 28 < changed_bits.mean() < 36


def test_order_is_that_of_order_version_1() -> None:
    """Resumed runs depend on these values: another order needs another ORDER_VERSION."""
    assert sampler.ORDER_VERSION == 1
    assert make_sampler(1000, 8, seed=3).windows_at_step(130).tolist() == [434, 930, 405, 967, 719, 336, 698, 423]
