"""Short versions of `python -m tests.torture`, which describes how to run the long ones."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import torture


def assert_no_problems(lines: Iterator[str]) -> None:
    reports = list(lines)
    assert reports and all(report.endswith(": 0 problems") for report in reports), "\n".join(reports)


def test_no_checkpoint_is_lost_when_killed_at_random_moments(tmp_path: Path) -> None:
    assert_no_problems(torture.kills(tmp_path, [(1, "auto"), (2, "fsdp")], 4, random.Random(1)))


@pytest.mark.slow
def test_no_checkpoint_is_lost_when_killed_at_io_calls_of_a_save(tmp_path: Path) -> None:
    assert_no_problems(torture.io(tmp_path, [(1, "auto")], every=5))


@pytest.mark.slow
def test_no_checkpoint_is_lost_when_killed_at_io_calls_of_a_save_by_several_ranks(tmp_path: Path) -> None:
    assert_no_problems(torture.io(tmp_path, [(2, "fsdp"), (3, "ddp")], every=9))


def test_any_signal_to_any_process_at_any_time_ends_the_run_saved(tmp_path: Path) -> None:
    assert_no_problems(torture.signals(tmp_path, [(1, "auto"), (2, "ddp")], 4, random.Random(2)))


@pytest.mark.slow
def test_run_killed_repeatedly_ends_bit_identical(tmp_path: Path) -> None:
    """On default settings: compiled, and in bf16 where the processor has it."""
    assert_no_problems(torture.identical(tmp_path, [(1, "auto")], 3, random.Random(3)))


def test_a_lost_checkpoint_would_be_noticed(tmp_path: Path) -> None:
    """The torture tests prove nothing if they cannot see a loss."""
    run = torture.start(torture.prepare(tmp_path / "a"), (1, "auto"), "num_training_steps=4")
    assert run.process.wait(60) == 0
    assert torture.checkpoint_problems(run, 4) == []
    assert "step 4 is the newest, 6 had been saved" in torture.checkpoint_problems(run, 6)
    shard = next((run.output_dir / "checkpoints/step-00000004").glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-1])
    assert len(torture.checkpoint_problems(run, 4)) == 2
