"""Saving in the background: what a checkpoint holds, when training waits, and what happens when a save fails."""

from __future__ import annotations

import json
import resource
import shutil
import subprocess
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.stateful import Stateful

from distgpt.checkpoint import saver, store
from distgpt.checkpoint.saver import Saver
from distgpt.checkpoint.store import Checkpoint
from distgpt.distributed.context import DistributedContext
from distgpt.errors import CheckpointError, RuntimeEnvironmentError
from distgpt.models.gpt2 import DecoderLM
from distgpt.optim.optimizers import AdamWConfig
from distgpt.training.state import ModelState, OptimizerState, Progress, RunFacts, TrainState
from tests.conftest import Run, command, environment, read_metrics, training_curve
from tests.started import PLAIN

CPU = torch.device("cpu")
SINGLE_PROCESS = DistributedContext(rank=0, world_size=1, local_world_size=1, device=CPU, num_threads=1)


def make_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> TrainState:
    """A training state with placeholders for what identifies a run."""
    run = RunFacts({}, {}, order_version=1, sequences_per_step=1, platform={}, tokens="", tokenizer="", run_id="")
    return TrainState(ModelState(model), OptimizerState(model, optimizer), run, Progress.start(CPU))


@pytest.fixture
def state() -> TrainState:
    """The state after an update, so that the optimizer has moments."""
    model = DecoderLM(257, 16, 4, 8, 1, seed=1)
    state = make_state(model, AdamWConfig().build(model))
    for group in state.optimizer.optimizer.param_groups:
        group["lr"] = 1e-2
    model(torch.arange(8)[None], targets=torch.arange(8)[None]).backward()
    state.optimizer.optimizer.step()
    return state


def copy_tensors(state: Stateful) -> dict[str, torch.Tensor]:
    tensors, _ = saver.split_state(state.state_dict())
    return {name: tensor.clone() for name, tensor in tensors.items()}


def assert_equal_tensors(tensors: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert tensors.keys() == expected.keys() and all(torch.equal(tensors[name], expected[name]) for name in expected)


def test_checkpoint_holds_the_step_at_which_it_was_requested(
    tmp_path: Path, state: TrainState, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Training continues while the checkpoint is written."""
    may_write = threading.Event()
    create_staging_dir = store.create_staging_dir
    monkeypatch.setattr(store, "create_staging_dir", lambda *args: (may_write.wait(), create_staging_dir(*args))[1])
    at_save = copy_tensors(state)
    with Saver(tmp_path, 2, 0, SINGLE_PROCESS) as background:
        background.save(1, state)
        state.optimizer.optimizer.step()
        state.progress.count_update(torch.tensor(1.0))
        may_write.set()
        background.wait(last=True)
    checkpoint, skipped = store.latest_valid(tmp_path)
    assert checkpoint is not None and checkpoint.step == 1 and not skipped
    assert checkpoint.state["progress"]["skipped"] == [0.0, 0.0]
    saver.restore(checkpoint, state, SINGLE_PROCESS)
    assert_equal_tensors(copy_tensors(state), at_save)
    assert state.progress.skipped.tolist() == [0.0, 0.0]


def test_a_field_of_the_state_is_all_it_takes_to_save_something(tmp_path: Path, state: TrainState) -> None:
    """Tensors go to the safetensors files, everything else to state.json, and all parts are restored."""

    @dataclass
    class Average(Stateful):
        weights: torch.Tensor
        num_updates: int

        def state_dict(self) -> dict[str, Any]:
            return {"weights": self.weights, "num_updates": self.num_updates}

        def load_state_dict(self, state_dict: dict[str, Any]) -> None:
            self.weights, self.num_updates = state_dict["weights"], state_dict["num_updates"]

    @dataclass
    class LargerState(TrainState):
        average: Average

    def larger_state(average: Average) -> LargerState:
        return LargerState(state.model, state.optimizer, state.run, state.progress, average)

    with Saver(tmp_path, 2, 0, SINGLE_PROCESS) as background:
        background.save(1, larger_state(Average(torch.arange(3.0), 7)))
    checkpoint, _ = store.latest_valid(tmp_path)
    assert checkpoint is not None and checkpoint.state["average"] == {"num_updates": 7}
    restored = larger_state(Average(torch.zeros(3), 0))
    saver.restore(checkpoint, restored, SINGLE_PROCESS)
    assert restored.average.weights.tolist() == [0.0, 1.0, 2.0] and restored.average.num_updates == 7


def test_one_save_is_in_flight_at_a_time_and_training_waits_for_no_other(
    tmp_path: Path, state: TrainState, monkeypatch: pytest.MonkeyPatch
) -> None:
    may_write, num_running, max_running = threading.Event(), [0], [0]
    write_checkpoint = saver.write_checkpoint

    def counted(*args: Any) -> None:
        num_running[0] += 1
        max_running[0] = max(max_running[0], num_running[0])
        may_write.wait()
        write_checkpoint(*args)
        num_running[0] -= 1

    monkeypatch.setattr(saver, "write_checkpoint", counted)
    with Saver(tmp_path, 2, 0, SINGLE_PROCESS) as background:
        background.save(1, state)  # returns before anything is written
        assert not list(store.list_checkpoints(tmp_path))
        threading.Timer(0.2, may_write.set).start()
        assert background.save(2, state) > 0.1  # waits for the first
        assert [step for step, _ in store.list_checkpoints(tmp_path)] == [1]
        background.wait(last=True)
    assert max_running == [1]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Five checkpoints, the second of which has the lowest validation loss."""
    for step, val_loss in ((1, 5.0), (2, 3.0), (3, None), (4, 4.0), (5, None)):
        make_checkpoint(tmp_path, step, val_loss)
    return tmp_path


def state_with(val_loss: float | None) -> dict[str, Any]:
    return {"progress": {"val_loss": val_loss}}


def make_checkpoint(output_dir: Path, step: int, val_loss: float | None) -> Path:
    staging_dir = store.create_staging_dir(output_dir, step, "test")
    (staging_dir / "shard.safetensors").write_bytes(bytes(100))
    digests = {"shard.safetensors": store.file_digest(staging_dir / "shard.safetensors")}
    store.write_manifest(staging_dir, digests, state_with(val_loss))
    return store.commit(staging_dir, output_dir, step)


def steps_on_disk(output_dir: Path) -> list[int]:
    return sorted(step for step, _ in store.list_checkpoints(output_dir))


def test_newest_and_best_checkpoints_are_kept(folder: Path) -> None:
    store.prune(folder, 5, keep=2)
    assert steps_on_disk(folder) == [2, 4, 5]
    make_checkpoint(folder, 6, 2.5)
    store.prune(folder, 6, keep=2)
    assert steps_on_disk(folder) == [5, 6]


def test_pruning_counts_only_valid_checkpoints(folder: Path) -> None:
    damage(folder, 2, 4)  # the best, and one of the newest
    store.prune(folder, 5, keep=2)
    assert steps_on_disk(folder) == [1, 3, 5]  # the best valid one, and the two newest valid ones


def test_damaged_checkpoints_are_deleted_only_once_enough_valid_ones_exist(folder: Path) -> None:
    damage(folder, 1, 2, 3, 4)
    store.prune(folder, 5, keep=2)
    assert steps_on_disk(folder) == [1, 2, 3, 4, 5]
    make_checkpoint(folder, 6, None)
    store.prune(folder, 6, keep=2)
    assert steps_on_disk(folder) == [5, 6]


def damage(output_dir: Path, *steps: int) -> None:
    for step in steps:
        (output_dir / f"checkpoints/step-{step:08d}/shard.safetensors").write_bytes(bytes(99))


def test_leftovers_and_misnamed_folders_are_ignored(folder: Path) -> None:
    for name in ("step-10.bak", "step-1", ".step-00000009.x.partial", ".step-00000001.deleted", "notes"):
        (folder / "checkpoints" / name).mkdir()
    latest, skipped = store.latest_valid(folder)
    assert latest is not None and latest.step == 5 and not skipped
    store.prune(folder, 5, keep=2)
    assert sorted(p.name for p in (folder / "checkpoints").iterdir() if not p.name.startswith("step-0")) == [
        "notes",
        "step-1",
        "step-10.bak",
    ]


def test_process_that_outlived_its_run_does_not_write_into_a_later_launchs_checkpoint(folder: Path) -> None:
    earlier = store.create_staging_dir(folder, 6, "earlier")
    later = store.create_staging_dir(folder, 6, "later")
    (earlier / "shard.safetensors").write_bytes(b"earlier")
    store.write_manifest(later, {}, state_with(None))
    (earlier / "more.safetensors").write_bytes(b"earlier")
    store.commit(later, folder, 6)
    assert store.latest_valid(folder)[0] == Checkpoint(folder / "checkpoints/step-00000006", 6, state_with(None))


def test_interrupted_deletion_leaves_no_partial_checkpoint(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "rmtree", lambda *_, **__: None)  # as if killed before it
    store.prune(folder, 5, keep=2)
    monkeypatch.undo()
    latest, skipped = store.latest_valid(folder)
    assert steps_on_disk(folder) == [2, 4, 5] and latest is not None and not skipped
    store.prune(folder, 5, keep=2)
    assert len(list((folder / "checkpoints").iterdir())) == 3


@pytest.mark.parametrize("fault", ["io:enospc:0:14", "io:eio:0:16"])
def test_failed_save_is_reported_and_has_no_other_effect(begin: Any, fault: str) -> None:
    run = begin(1, *PLAIN, fault=fault)
    assert run.process.wait(60) == 0, run.text()
    (warning,) = [line for line in run.text().splitlines() if line.startswith("warning: ")]
    assert warning.startswith("warning: checkpoint of step 8 not saved (injected: ")
    assert warning.endswith(f"; earlier ones are intact; free disk space or fix what failed: {run.output_dir}")
    assert steps_on_disk(run.output_dir) == [4, 12] and run.newest_step() == 12
    assert not list((run.output_dir / "checkpoints").glob(".*"))
    assert len(training_curve(run.output_dir)) == 12


def test_repeated_save_failures_end_the_run_with_the_last_checkpoint_intact(
    config_file: Path, tmp_path: Path, run: Run
) -> None:
    """With a real limit: from the second checkpoint on, no file may be larger than 100 kB."""
    options = (*PLAIN, "lr_decay_steps=12")
    assert run("train", config_file, *options, "num_training_steps=4").returncode == 0
    limit = 100_000
    resumed = subprocess.run(
        command("train", [config_file, *options, "num_training_steps=100"]),
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )
    assert resumed.returncode == 6 and resumed.stderr.count("\n") == 1 and "File too large" in resumed.stderr
    assert "(3 saves in a row have failed)" in resumed.stderr
    assert len([line for line in resumed.stdout.splitlines() if line.startswith("warning: checkpoint of step")]) >= 2
    latest, skipped = store.latest_valid(tmp_path / "run")
    assert latest is not None and latest.step == 4 and not skipped
    assert run("train", config_file, *options, "num_training_steps=12").returncode == 0
    assert [step for step, _, _ in training_curve(tmp_path / "run")] == list(range(1, 13))


def test_a_bug_in_a_save_fails_the_run(begin: Any) -> None:
    run = begin(1, *PLAIN, "num_training_steps=6", fault="checkpoint.store.write_manifest:raise:0:2")
    assert run.process.wait(60) == 1 and "RuntimeError: injected" in run.text()
    assert run.newest_step() == 4 and run.status()["state"] == "failed"


@pytest.mark.parametrize(
    "fault", ["checkpoint.store.file_digest:eio:0:5", "checkpoint.saver.HuggingFaceStorageWriter.write_data:oom:0:2"]
)
def test_any_error_in_writing_or_reading_back_is_a_failed_save(begin: Any, fault: str) -> None:
    run = begin(1, *PLAIN, fault=fault)
    assert run.process.wait(60) == 0, run.text()
    assert len([line for line in run.text().splitlines() if line.startswith("warning: checkpoint of step")]) == 1
    assert run.newest_step() == 12


def test_no_checkpoint_is_deleted_when_the_new_one_does_not_read_back(folder: Path) -> None:
    damage(folder, 5)
    with pytest.raises(CheckpointError, match="step-00000005/shard"):
        store.prune(folder, 5, keep=2)
    assert steps_on_disk(folder) == [1, 2, 3, 4, 5]


def test_nan_loss_is_never_the_best(folder: Path) -> None:
    make_checkpoint(folder, 6, float("nan"))
    store.prune(folder, 6, keep=2)
    assert steps_on_disk(folder) == [2, 5, 6]


def test_failure_of_the_last_save_fails_the_run(begin: Any) -> None:
    run = begin(1, *PLAIN, "num_training_steps=6", fault="io:enospc:0:14")
    assert run.process.wait(60) == 6
    assert "checkpoint of step 6 not saved" in run.lines()[0] and run.newest_step() == 4
    assert not (run.output_dir / "eval.json").exists()


def test_disk_without_space_for_a_checkpoint_is_refused_at_the_start(
    config_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from distgpt.config.loader import load_config
    from distgpt.resilience.preflight import run_preflight

    usage = shutil.disk_usage(tmp_path)
    config = load_config(config_file)
    for free, expected in ((10**5, "expected 0 MB or more for a checkpoint"), (10**6, None), (10**7, "")):
        monkeypatch.setattr(shutil, "disk_usage", lambda _, free=free: usage._replace(free=free))
        if expected:
            with pytest.raises(RuntimeEnvironmentError, match=expected):
                run_preflight(config, False)
        else:
            notes = run_preflight(config, False).notes
            assert any("checkpoints of" in note for note in notes) == (expected is None)


def test_full_disk_stops_neither_training_nor_the_metrics(config_file: Path, tmp_path: Path) -> None:
    """The metrics file reaches a limit of its own length, which is then lifted."""
    from distgpt.config.loader import load_config
    from distgpt.training.metrics import MetricLogger

    config = load_config(config_file)
    Path(config.output_dir).mkdir()
    logger = MetricLogger(
        config, first_step=0, validated=True, flops_per_token=1, peak_tflops=None, world_size=1, run_id="x"
    )
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        for step in range(1, 9):
            resource.setrlimit(resource.RLIMIT_FSIZE, (100 if 2 < step < 7 else soft, hard))
            logger.log_checkpoint_wait(step, 0.0)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    logger.close()
    assert [row["step"] for row in read_metrics(tmp_path / "run")] == list(range(1, 9))


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_save_that_fails_on_one_rank_fails_on_all_and_training_continues(begin: Any, strategy: str) -> None:
    run = begin(2, *PLAIN, f"parallel.strategy={strategy}", "hang_minutes=1", fault="io:enospc:1:3")
    assert run.process.wait(90) == 0, run.text()
    assert any(line.startswith("warning: checkpoint of step 4 not saved (rank 1: ") for line in run.text().splitlines())
    assert steps_on_disk(run.output_dir) == [8, 12] and run.newest_step() == 12


def test_time_that_training_waited_is_recorded(begin: Any) -> None:
    run = begin(1, *PLAIN)
    assert run.process.wait(60) == 0
    waits = [row for row in read_metrics(run.output_dir) if "checkpoint-wait-seconds" in row]
    assert [row["step"] for row in waits] == [4, 8, 12]
    state = json.loads((run.output_dir / "checkpoints/step-00000012/state.json").read_text())
    assert state["run"]["platform"]["ranks"] == 1 and state["progress"]["val_loss"] is None
