"""Short versions of `python -m tests.torture`, which says how to run the long ones."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import torture


def passes(lines: Iterator[str]) -> None:
    reports = list(lines)
    assert reports and all(report.endswith(": 0 problems") for report in reports), "\n".join(reports)


def test_killed_at_random_moments_it_loses_no_checkpoint(tmp_path: Path) -> None:
    passes(torture.kills(tmp_path, [(1, "auto"), (2, "fsdp")], 4, random.Random(1)))


@pytest.mark.slow
def test_killed_at_calls_of_a_save_it_loses_no_checkpoint(tmp_path: Path) -> None:
    passes(torture.io(tmp_path, [(1, "auto")], every=5))


@pytest.mark.slow
def test_killed_at_calls_of_a_save_by_several_ranks_it_loses_no_checkpoint(tmp_path: Path) -> None:
    passes(torture.io(tmp_path, [(2, "fsdp"), (3, "ddp")], every=9))


def test_any_signal_to_anybody_at_any_time_ends_it_saved(tmp_path: Path) -> None:
    passes(torture.signals(tmp_path, [(1, "auto"), (2, "ddp")], 4, random.Random(2)))


@pytest.mark.slow
def test_killed_again_and_again_it_ends_with_the_same_bits(tmp_path: Path) -> None:
    """On default settings: compiled, and in bf16 where the processor has it."""
    passes(torture.twenty(tmp_path, [(1, "auto")], 3, random.Random(3)))


def test_a_lost_checkpoint_would_be_noticed(tmp_path: Path) -> None:
    """The harness is no better than what it sees."""
    run = torture.start(torture.prepare(tmp_path / "a"), (1, "auto"), "num_training_steps=4")
    assert run.process.wait(60) == 0
    assert torture.sound(run, 4) == [] and "step 4 is the newest, 6 had been saved" in torture.sound(run, 6)
    shard = next((run.output_dir / "checkpoints/step-00000004").glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-1])
    assert len(torture.sound(run, 4)) == 2
