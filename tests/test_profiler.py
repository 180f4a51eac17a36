"""A profile contains the chosen steps of every rank, and changes nothing else."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
import torch

from distgpt.distributed.context import init_distributed
from distgpt.training.profiler import StepProfiler
from tests.conftest import Run, training_curve


def profiled_steps(trace: Path) -> list[str]:
    """The labels of the steps in a trace."""
    events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    return sorted({str(event.get("name")) for event in events if str(event.get("name")).startswith("ProfilerStep#")})


def operations(trace: Path) -> set[str]:
    """The names of all operations in a trace."""
    return {str(event.get("name")) for event in json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]}


@pytest.mark.parametrize(
    ("steps", "first_step", "last_step", "num_profiled"),
    [
        ((4, 6), 0, 12, 3),
        ((1, 2), 0, 12, 2),
        ((12, 15), 0, 12, 1),
        ((7, 10), 8, 12, 2),  # a resumed run
        ((3, 3), 2, 3, 1),
    ],
)
def test_exactly_the_chosen_steps_are_profiled(
    tmp_path: Path, steps: tuple[int, int], first_step: int, last_step: int, num_profiled: int
) -> None:
    messages: list[str] = []
    context = init_distributed("cpu")
    x = torch.ones(8, 8)
    with StepProfiler(steps, first_step, tmp_path, context, messages.append, last_step) as profiler:
        for step in range(first_step + 1, last_step + 1):
            with torch.profiler.record_function(f"training step {step}"):
                x = x @ x.softmax(0)
            profiler.step_done()
    folder = tmp_path / "profile"
    assert messages == [f"profile {folder}: operations.txt, and trace-rank-*.json.gz for ui.perfetto.dev"]
    trace = folder / "trace-rank-0.json.gz"
    assert len(profiled_steps(trace)) == num_profiled
    first, last = max(steps[0], first_step + 1), min(steps[1], last_step)
    labels = {name for name in operations(trace) if name.startswith("training step")}
    assert labels == {f"training step {step}" for step in range(first, last + 1)}
    assert "aten::mm" in (folder / "operations.txt").read_text()


@pytest.mark.parametrize(("steps", "first_step"), [(None, 0), ((7, 10), 10), ((13, 14), 0)])
def test_nothing_is_profiled_where_no_chosen_step_is_made(
    tmp_path: Path, steps: tuple[int, int] | None, first_step: int
) -> None:
    with StepProfiler(steps, first_step, tmp_path, init_distributed("cpu"), print, last_step=12) as profiler:
        for _ in range(first_step, 12):
            profiler.step_done()
    assert not list(tmp_path.iterdir())


def test_a_loop_that_ends_early_keeps_its_profile(tmp_path: Path) -> None:
    messages: list[str] = []
    step_profiler = StepProfiler((2, 9), 0, tmp_path, init_distributed("cpu"), messages.append, last_step=12)
    with pytest.raises(KeyboardInterrupt), step_profiler as profiler:
        for step in range(1, 13):
            if step == 4:
                raise KeyboardInterrupt
            profiler.step_done()
    assert len(messages) == 1 and len(profiled_steps(tmp_path / "profile" / "trace-rank-0.json.gz")) == 3


def test_every_rank_of_a_training_run_writes_its_profile(run: Run, config_file: Path, tmp_path: Path) -> None:
    completed = run("train", config_file, "profile.steps=[4, 6]", ranks=2)
    assert completed.returncode == 0, completed.stderr
    folder = tmp_path / "run" / "profile"
    assert f"profile {folder}: operations.txt, and trace-rank-*.json.gz for ui.perfetto.dev" in completed.stdout
    for rank in range(2):
        trace = folder / f"trace-rank-{rank}.json.gz"
        assert len(profiled_steps(trace)) == 3
        assert {"aten::embedding", "aten::embedding_dense_backward", "aten::_fused_adamw_"} <= operations(trace)
    assert "aten::mm" in (folder / "operations.txt").read_text()


@pytest.mark.parametrize(("steps", "num_profiled"), [((1, 2), 2), ((12, 15), 1)])
def test_the_first_and_the_last_steps_of_a_run_can_be_profiled(
    run: Run, config_file: Path, tmp_path: Path, steps: tuple[int, int], num_profiled: int
) -> None:
    completed = run("train", config_file, f"profile.steps={list(steps)}")
    assert completed.returncode == 0, completed.stderr
    trace = tmp_path / "run" / "profile" / "trace-rank-0.json.gz"
    assert len(profiled_steps(trace)) == num_profiled
    assert {"aten::embedding", "aten::embedding_dense_backward", "aten::_fused_adamw_"} <= operations(trace)


def test_profiling_changes_no_result_and_a_profile_that_cannot_be_written_does_not_end_the_run(
    run: Run, config_file: Path, tmp_path: Path
) -> None:
    assert run("train", config_file).returncode == 0
    curve = training_curve(tmp_path / "run")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "profile").write_text("a file where the folder would be")
    completed = run("train", config_file, f"output_dir={tmp_path}/other", "profile.steps=[2, 3]")
    assert completed.returncode == 0 and "no profile was written" in completed.stdout
    assert training_curve(tmp_path / "other") == curve


def test_a_resumed_run_does_not_profile_the_steps_before_it(run: Run, config_file: Path, tmp_path: Path) -> None:
    trace = tmp_path / "run" / "profile" / "trace-rank-0.json.gz"
    schedule = "lr_decay_steps=14"  # the same learning rates whatever num_training_steps
    assert run("train", config_file, schedule, "num_training_steps=8").returncode == 0
    assert run("train", config_file, schedule, "profile.steps=[7, 10]").returncode == 0
    assert len(profiled_steps(trace)) == 2
    trace.unlink()
    assert run("train", config_file, schedule, "num_training_steps=14", "profile.steps=[7, 10]").returncode == 0
    assert not trace.exists()
