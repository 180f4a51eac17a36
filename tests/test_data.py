"""Order is arithmetic: every window once an epoch, the same at any number of ranks, from the step number alone."""

from __future__ import annotations

import os
import random
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from distgpt import data
from distgpt.data import ShuffledReader, held_out_batches, permute
from distgpt.errors import DataError
from distgpt.loss import IGNORED
from distgpt.plan import BatchPlan
from distgpt.shards import TokenArray, open_tokens
from tests.conftest import Run

T = 8
CPU = torch.device("cpu")


def tokens_of(folder: Path, length: int) -> TokenArray:
    """Token i is i, so that a batch says where it was read."""
    np.save(folder / f"{length}.npy", np.arange(length, dtype=np.uint16))
    return open_tokens(folder / f"{length}.npy")["tokens"]


def reader(
    folder: Path, windows: int, G: int, ranks: int, rank: int, batch_size: int = 4, seed: int = 0
) -> ShuffledReader:
    return ShuffledReader(tokens_of(folder, windows * T + 1), 65_536, T, seed, BatchPlan(G, batch_size, ranks), rank)


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 16, 17, 100, 1023, 1025, 5000])
def test_the_permutation_is_one(size: int) -> None:
    for key in ("0/0", "0/1", "7/0"):
        assert sorted(permute(np.arange(size), size, key)) == list(range(size))


def test_the_permutation_reaches_sizes_that_no_memory_holds() -> None:
    size = 10**12 + 39
    asked = np.arange(0, size, size // 1000)
    got = permute(asked, size, "0/0")
    assert got.min() >= 0 and got.max() < size and len(set(got.tolist())) == len(asked)
    # Spread evenly: a tenth of the range gets about a tenth of 1,001 (4 standard deviations: 38).
    counts = np.bincount((got // (size // 10)).clip(max=9), minlength=10)
    assert abs(counts - 100.1).max() < 38


def test_the_permutation_looks_random() -> None:
    n = 2000
    places = np.stack([permute(np.arange(n), n, f"0/{epoch}") for epoch in range(40)])
    # Neighbours part, windows move between epochs, and no place prefers a window.
    assert (np.abs(np.diff(places)) == 1).mean() < 0.005
    assert (places[1:] == places[:-1]).mean() < 0.005
    assert abs(np.corrcoef(np.arange(n), places[0])[0, 1]) < 0.1
    assert abs(places.mean(0).mean() - (n - 1) / 2) < 1e-9 and places.mean(0).std() < 1.3 * n / np.sqrt(12 * 40)


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
@pytest.mark.parametrize(("windows", "G"), [(20, 4), (17, 5), (7, 7), (10, 3)])
def test_each_epoch_reads_every_window_exactly_once_over_all_ranks(
    tmp_path: Path, ranks: int, windows: int, G: int
) -> None:
    readers = [reader(tmp_path, windows, G, ranks, rank) for rank in range(ranks)]
    steps = 3 * windows  # a multiple of the epoch: 3 G epochs
    read = Counter(int(w) for step in range(steps) for r in readers for w in r.windows_at(step))
    assert read == dict.fromkeys(range(windows), 3 * G)
    stream = np.concatenate([np.sort(readers[0].windows(np.arange(e * windows, (e + 1) * windows))) for e in range(3)])
    assert (stream.reshape(3, windows) == np.arange(windows)).all()


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_any_number_of_ranks_reads_the_same_sequences_at_a_step(tmp_path: Path, ranks: int) -> None:
    alone = reader(tmp_path, 50, 8, 1, 0)
    together = [reader(tmp_path, 50, 8, ranks, rank) for rank in range(ranks)]
    for step in (0, 3, 6, 7, 1000):
        ours = np.empty(8, dtype=np.int64)
        for rank, r in enumerate(together):
            ours[rank::ranks] = r.windows_at(step)
        np.testing.assert_array_equal(ours, alone.windows_at(step))


def test_seeds_and_epochs_change_the_order(tmp_path: Path) -> None:
    first = reader(tmp_path, 50, 50, 1, 0)
    other = reader(tmp_path, 50, 50, 1, 0, seed=1)
    assert first.windows_at(0).tolist() != other.windows_at(0).tolist()
    assert first.windows_at(0).tolist() != first.windows_at(1).tolist()


@pytest.mark.parametrize("ranks", [1, 3, 4])
def test_batches_hold_windows_with_their_targets(tmp_path: Path, ranks: int) -> None:
    for rank in range(ranks):
        r = reader(tmp_path, 20, 5, ranks, rank, batch_size=1)
        batches = r.at(2)
        assert len(batches) == r.plan.micro_steps
        real = [b for b in batches if (b.targets_BT != IGNORED).any()]
        assert [int(b.ids_BT[0, 0]) // T for b in real] == r.windows_at(2).tolist()
        for batch in real:
            assert torch.equal(batch.targets_BT, batch.ids_BT + 1)


def test_reading_ahead_from_any_step_gives_the_same_batches(tmp_path: Path) -> None:
    r = reader(tmp_path, 20, 5, 1, 0)
    for first in (0, 3):
        for step, batches in enumerate(r.steps(first, 7, CPU), first):
            for got, expected in zip(batches, r.at(step), strict=True):
                assert torch.equal(got.ids_BT, expected.ids_BT) and torch.equal(got.targets_BT, expected.targets_BT)
        assert step == 6


def test_an_error_while_reading_ahead_is_the_readers_own(tmp_path: Path) -> None:
    r = reader(tmp_path, 20, 5, 1, 0)
    steps = r.steps(0, 1000, CPU)
    next(steps)
    os.truncate(tmp_path / f"{20 * T + 1}.npy", 150)
    with pytest.raises(DataError, match=r"^[^\n]*the file was cut short or replaced: restore it$"):
        for _ in steps:
            pass


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
@pytest.mark.parametrize("batch_size", [1, 4, 64])
@pytest.mark.parametrize("length", [2, 8, 9, 10, 100, 101])
def test_validation_counts_every_token_once(tmp_path: Path, ranks: int, batch_size: int, length: int) -> None:
    tokens = tokens_of(tmp_path, length)
    seen: list[int] = []
    shapes = []
    for rank in range(ranks):
        batches = list(held_out_batches(tokens, 65_536, T, batch_size, rank, ranks))
        shapes.append([tuple(batch.ids_BT.shape) for batch in batches])
        for batch in batches:
            real = batch.targets_BT != IGNORED
            assert torch.equal(batch.targets_BT[real], batch.ids_BT[real] + 1)
            seen += batch.targets_BT[real].tolist()
    assert sorted(seen) == list(range(1, length))
    assert all(shape == shapes[0] for shape in shapes)  # every rank calls the model equally often


def test_validation_stops_at_its_limit(tmp_path: Path) -> None:
    batches = held_out_batches(tokens_of(tmp_path, 100), 65_536, T, 4, 0, 1, max_tokens=21)
    assert sum(int((b.targets_BT != IGNORED).sum()) for b in batches) == 21


def test_memory_does_not_grow_with_what_is_read(tmp_path: Path) -> None:
    def resident() -> int:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")

    np.save(tmp_path / "long.npy", np.zeros(16 * 2**20, dtype=np.uint16))  # 32 MiB
    tokens = open_tokens(tmp_path / "long.npy")["tokens"]
    r = ShuffledReader(tokens, 257, 1024, 0, BatchPlan(256, 256, 1), 0)
    r.at(0)
    before = resident()
    for step in range(200):  # three times through the file
        r.at(step)
    assert resident() - before < 8 * 2**20


def test_the_command_shows_what_a_file_holds(run: Run, corpus: Path) -> None:
    done = run("data", corpus, "--tokenizer", "bytes")
    assert done.returncode == 0, done.stderr
    assert "val: 1,003 tokens (uint16), 7 windows" in done.stdout


def test_the_command_refuses_ids_outside_the_vocabulary(run: Run, tmp_path: Path) -> None:
    np.savez(tmp_path / "t.npz", train=np.array([1, 2, 60_000]))
    done = run("data", "t.npz")
    assert done.returncode == 3
    assert done.stderr == (
        "distgpt: error: t.npz: train[2] is token 60000, expected 0 to 50256 (the tokenizer's vocabulary); "
        "check tokenizer_encoding or make the tokens again\n"
    )


def test_mixing_uses_all_bits() -> None:
    flipped = data.mix(np.uint64(1) << np.arange(64, dtype=np.uint64)) ^ data.mix(np.zeros(64, dtype=np.uint64))
    changed_bits = np.array([int(word).bit_count() for word in flipped])
    assert changed_bits.min() > 16 and 28 < changed_bits.mean() < 36


def test_reading_draws_from_no_generator_and_moves_none(tmp_path: Path) -> None:
    r = reader(tmp_path, 20, 5, 1, 0)
    seen = []
    for seed in (0, 1):
        random.seed(seed), np.random.seed(seed), torch.manual_seed(seed)
        before = [random.getstate(), str(np.random.get_state()), torch.get_rng_state().tolist()]
        seen.append([batch.ids_BT.tolist() for batches in r.steps(0, 3, CPU) for batch in batches])
        assert [random.getstate(), str(np.random.get_state()), torch.get_rng_state().tolist()] == before
    assert seen[0] == seen[1]


def test_twenty_passes_keep_no_more_memory_than_one(tmp_path: Path) -> None:
    """Of a file eight times as large as what may be kept."""
    np.save(tmp_path / "long.npy", np.zeros(8 * 2**20, dtype=np.uint16))  # 16 MiB, in 511 windows
    r = ShuffledReader(open_tokens(tmp_path / "long.npy")["tokens"], 257, 2**14, 0, BatchPlan(511, 8, 1), 0)
    resident = []
    for first in range(20):
        for start in range(first * 511, (first + 1) * 511, 8):
            for window in r.windows(np.arange(start, start + 8)):
                r.tokens.read(window * 2**14, (window + 1) * 2**14 + 1, 257)
        resident.append(int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE"))
    assert resident[-1] - resident[0] < 2 * 2**20
