"""Ranks find each other, agree, and fail together."""

from __future__ import annotations

import pytest
import torch

from distgpt import world as worlds
from distgpt.errors import MachineError
from tests.ranks import results


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_an_error_on_one_rank_is_every_ranks_error(ranks: int) -> None:
    found, _ = results(ranks)
    for seen in found["agreement"]:
        assert seen["heard"][0] == f"DataError: rank {ranks - 1}: no tokens here"
        assert seen["heard"][1].startswith("ConfigError: seed: rank 0 has 0 and rank 1 has 1")
        assert seen["gathered"] == [{"rank": rank, "text": "x" * rank} for rank in range(ranks)]


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"RANK": "0"}, "without WORLD_SIZE"),
        ({"WORLD_SIZE": "2"}, "without RANK"),
        ({"LOCAL_RANK": "0"}, "without RANK, WORLD_SIZE"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "expected 0 to 1"),
        ({"RANK": "x", "WORLD_SIZE": "2"}, "expected whole numbers"),
    ],
)
def test_half_an_environment_is_refused(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], expected: str
) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(MachineError, match=expected):
        worlds.start("cpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
@pytest.mark.parametrize("device", ["cuda", "cuda:1"])
def test_a_gpu_that_is_not_there_is_refused(device: str) -> None:
    with pytest.raises(MachineError, match="finds no NVIDIA GPU"):
        worlds.choose_device(device, 0, 1)


def test_threads_share_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    alone = worlds.choose_threads(1)
    assert worlds.choose_threads(alone) == 1
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # torchrun's own default does not count as the user's choice
    assert worlds.choose_threads(2) == max(1, alone // 2)
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert worlds.choose_threads(2) == 3
