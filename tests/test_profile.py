"""A profile holds the steps asked for, of every rank, and changes nothing else."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from tests.conftest import Run, training_curve


def traced_steps(trace: Path) -> int:
    """Steps that a trace holds, having looked that they contain forward, backward and update."""
    events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    names = [str(event.get("name")) for event in events]
    assert {"aten::embedding", "aten::embedding_dense_backward", "aten::_fused_adamw_"} <= set(names)
    return len({name for name in names if name.startswith("ProfilerStep#")})


@pytest.mark.parametrize(("ranks", "steps", "traced"), [(2, (4, 6), 3), (1, (1, 2), 2), (1, (12, 15), 1)])
def test_the_steps_asked_for_are_traced(
    run: Run, config_file: Path, tmp_path: Path, ranks: int, steps: tuple[int, int], traced: int
) -> None:
    found = run("train", config_file, f"profile.steps={list(steps)}", ranks=ranks)
    assert found.returncode == 0, found.stderr
    folder = tmp_path / "run" / "profile"
    assert f"profile {folder}: operations.txt, and trace-rank-*.json.gz for ui.perfetto.dev" in found.stdout
    assert [traced_steps(folder / f"trace-rank-{rank}.json.gz") for rank in range(ranks)] == [traced] * ranks
    assert "aten::mm" in (folder / "operations.txt").read_text()


def test_a_profile_changes_no_result_and_none_that_cannot_be_written_ends_a_run(
    run: Run, config_file: Path, tmp_path: Path
) -> None:
    assert run("train", config_file).returncode == 0
    plain = training_curve(tmp_path / "run")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "profile").write_text("in the way")
    found = run("train", config_file, f"output_dir={tmp_path}/other", "profile.steps=[2, 3]")
    assert found.returncode == 0 and "no profile was written" in found.stdout
    assert training_curve(tmp_path / "other") == plain


def test_steps_that_a_resumed_run_has_behind_it_are_not_traced(run: Run, config_file: Path, tmp_path: Path) -> None:
    assert run("train", config_file, "num_training_steps=8").returncode == 0
    assert run("train", config_file, "profile.steps=[7, 10]").returncode == 0
    assert traced_steps(tmp_path / "run" / "profile" / "trace-rank-0.json.gz") == 2
    (tmp_path / "run" / "profile" / "trace-rank-0.json.gz").unlink()
    assert run("train", config_file, "num_training_steps=14", "profile.steps=[7, 10]").returncode == 0
    assert not (tmp_path / "run" / "profile" / "trace-rank-0.json.gz").exists()
