"""Batches hold the right tokens and targets, prefetching changes nothing, and memory does not grow."""

from __future__ import annotations

import os
import random
from pathlib import Path

import numpy as np
import pytest
import torch

from distgpt.data.dataloader import TrainLoader, validation_batches
from distgpt.data.dataset import TokenWindows, num_windows
from distgpt.data.sampler import BatchPlan, Sampler
from distgpt.data.token_files import TokenArray, open_token_file
from distgpt.errors import DataError
from distgpt.models.cross_entropy import IGNORE_INDEX

T = 8
CPU = torch.device("cpu")


def counting_tokens(folder: Path, length: int) -> TokenArray:
    """Token i is i, so that a batch shows where it was read."""
    np.save(folder / f"{length}.npy", np.arange(length, dtype=np.uint16))
    return open_token_file(folder / f"{length}.npy")["tokens"]


def make_loader(tokens: TokenArray, seq_len: int, plan: BatchPlan, dp_rank: int = 0) -> TrainLoader:
    windows = TokenWindows(tokens, seq_len, 65_536)
    return TrainLoader(windows, Sampler(len(windows), 0, plan, dp_rank))


def counting_loader(folder: Path) -> TrainLoader:
    """One rank, 20 windows of counting tokens, 5 sequences per step."""
    return make_loader(counting_tokens(folder, 20 * T + 1), T, BatchPlan(5, 4, 1))


@pytest.mark.parametrize("dp_size", [1, 3, 4])
def test_batches_hold_windows_with_their_targets(tmp_path: Path, dp_size: int) -> None:
    tokens = counting_tokens(tmp_path, 20 * T + 1)
    for dp_rank in range(dp_size):
        loader = make_loader(tokens, T, BatchPlan(5, 1, dp_size), dp_rank)
        batches = loader.micro_batches(2)
        assert len(batches) == loader.sampler.plan.micro_steps
        with_targets = [b for b in batches if (b.targets_BT != IGNORE_INDEX).any()]
        assert [int(b.ids_BT[0, 0]) // T for b in with_targets] == loader.sampler.windows_at_step(2).tolist()
        for batch in with_targets:
            assert torch.equal(batch.targets_BT, batch.ids_BT + 1)


def test_prefetching_from_any_step_gives_the_same_batches(tmp_path: Path) -> None:
    loader = counting_loader(tmp_path)
    for first_step in (0, 3):
        for step, batches in enumerate(loader.iterate(first_step, 7, CPU), first_step):
            for batch, expected in zip(batches, loader.micro_batches(step), strict=True):
                assert torch.equal(batch.ids_BT, expected.ids_BT)
                assert torch.equal(batch.targets_BT, expected.targets_BT)
        assert step == 6


def test_error_while_prefetching_is_raised_as_the_readers_own(tmp_path: Path) -> None:
    steps = counting_loader(tmp_path).iterate(0, 1000, CPU)
    next(steps)
    os.truncate(tmp_path / f"{20 * T + 1}.npy", 150)
    with pytest.raises(DataError, match=r"^[^\n]*the file was truncated or replaced: restore it$"):
        for _ in steps:
            pass


@pytest.mark.parametrize("dp_size", [1, 2, 3, 4])
@pytest.mark.parametrize("batch_size", [1, 4, 64])
@pytest.mark.parametrize("length", [2, 8, 9, 10, 100, 101])
def test_validation_counts_every_token_once(tmp_path: Path, dp_size: int, batch_size: int, length: int) -> None:
    tokens = counting_tokens(tmp_path, length)
    all_targets: list[int] = []
    shapes = []
    for dp_rank in range(dp_size):
        batches = list(validation_batches(tokens, 65_536, T, batch_size, dp_rank, dp_size))
        shapes.append([tuple(batch.ids_BT.shape) for batch in batches])
        for batch in batches:
            has_target = batch.targets_BT != IGNORE_INDEX
            assert torch.equal(batch.targets_BT[has_target], batch.ids_BT[has_target] + 1)
            all_targets += batch.targets_BT[has_target].tolist()
    assert sorted(all_targets) == list(range(1, length))
    assert all(shape == shapes[0] for shape in shapes)  # every rank calls the model equally often


def test_validation_stops_at_max_tokens(tmp_path: Path) -> None:
    batches = validation_batches(counting_tokens(tmp_path, 100), 65_536, T, 4, 0, 1, max_tokens=21)
    assert sum(int((b.targets_BT != IGNORE_INDEX).sum()) for b in batches) == 21


def resident_bytes() -> int:
    """Memory of this process that is in RAM."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_memory_does_not_grow_with_the_number_of_steps(tmp_path: Path) -> None:
    np.save(tmp_path / "long.npy", np.zeros(16 * 2**20, dtype=np.uint16))  # 32 MiB
    loader = make_loader(open_token_file(tmp_path / "long.npy")["tokens"], 1024, BatchPlan(256, 256, 1))
    loader.micro_batches(0)
    before = resident_bytes()
    for step in range(200):  # three times through the file
        loader.micro_batches(step)
    assert resident_bytes() - before < 8 * 2**20


def test_loading_neither_uses_nor_changes_global_random_generators(tmp_path: Path) -> None:
    loader = counting_loader(tmp_path)
    ids = []
    for seed in (0, 1):
        random.seed(seed), np.random.seed(seed), torch.manual_seed(seed)
        before = [random.getstate(), str(np.random.get_state()), torch.get_rng_state().tolist()]
        ids.append([batch.ids_BT.tolist() for batches in loader.iterate(0, 3, CPU) for batch in batches])
        assert [random.getstate(), str(np.random.get_state()), torch.get_rng_state().tolist()] == before
    assert ids[0] == ids[1]


def test_twenty_epochs_use_no_more_memory_than_one(tmp_path: Path) -> None:
    """The file is eight times as large as the growth that is allowed."""
    np.save(tmp_path / "long.npy", np.zeros(8 * 2**20, dtype=np.uint16))  # 16 MiB, in 511 windows
    tokens = open_token_file(tmp_path / "long.npy")["tokens"]
    sampler = Sampler(511, 0, BatchPlan(511, 8, 1), 0)
    assert num_windows(len(tokens), 2**14) == 511
    resident = []
    for first in range(20):
        for start in range(first * 511, (first + 1) * 511, 8):
            for window in sampler.window_ids(np.arange(start, start + 8)):
                tokens.read(window * 2**14, (window + 1) * 2**14 + 1, 257)
        resident.append(resident_bytes())
    assert resident[-1] - resident[0] < 2 * 2**20
