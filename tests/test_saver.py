"""Saving in the background: what it holds, what it holds up, and what becomes of it when something goes wrong."""

from __future__ import annotations

import json
import resource
import shutil
import subprocess
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from distgpt import checkpoint, saver
from distgpt.checkpoint import Checkpoint
from distgpt.config import OptimizerConfig
from distgpt.errors import CheckpointError, MachineError
from distgpt.model import DecoderLM
from distgpt.optim import build_optimizer, set_learning_rate
from distgpt.saver import Saver
from tests.conftest import Run, command, environment, read_metrics, training_curve
from tests.started import PLAIN
from tests.test_exercise import ALONE


@pytest.fixture
def model() -> DecoderLM:
    return DecoderLM(257, 16, 4, 8, 1, seed=1)


@pytest.fixture
def optimizer(model: DecoderLM) -> torch.optim.Optimizer:
    """After a step, so that there are moments."""
    optimizer = build_optimizer(model, OptimizerConfig())
    set_learning_rate(optimizer, 1e-2)
    model(torch.arange(8)[None], targets_BT=torch.arange(8)[None]).backward()
    optimizer.step()
    return optimizer


def contents(model: DecoderLM, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in saver.tensors_of(model, optimizer).items()}


def test_a_checkpoint_holds_the_step_it_was_asked_at_whatever_the_loop_does_meanwhile(
    tmp_path: Path, model: DecoderLM, optimizer: torch.optim.Optimizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = threading.Event()
    begin = checkpoint.begin
    monkeypatch.setattr(checkpoint, "begin", lambda *arguments: (gate.wait(), begin(*arguments)))
    then = contents(model, optimizer)
    with Saver(tmp_path, 2, 0, ALONE) as background:
        background.save(1, model, optimizer, {"val_loss": None})
        optimizer.step()
        gate.set()
        background.wait(last=True)
    found, rejected = checkpoint.newest(tmp_path)
    assert found is not None and found.step == 1 and not rejected
    saver.restore(found, model, optimizer, ALONE)
    now = contents(model, optimizer)
    assert now.keys() == then.keys() and all(torch.equal(now[name], then[name]) for name in then)


def test_one_save_is_in_flight_at_most_and_the_loop_waits_for_no_other(
    tmp_path: Path, model: DecoderLM, optimizer: torch.optim.Optimizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate, running, most = threading.Event(), [0], [0]
    write = saver.write

    def counted(*arguments: Any) -> None:
        running[0] += 1
        most[0] = max(most[0], running[0])
        gate.wait()
        write(*arguments)
        running[0] -= 1

    monkeypatch.setattr(saver, "write", counted)
    with Saver(tmp_path, 2, 0, ALONE) as background:
        background.save(1, model, optimizer, {"val_loss": None})  # comes back though nothing is written yet
        assert not list(checkpoint.on_disk(tmp_path))
        threading.Timer(0.2, gate.set).start()
        assert background.save(2, model, optimizer, {"val_loss": None}) > 0.1  # waits for the first
        assert [step for step, _ in checkpoint.on_disk(tmp_path)] == [1]
        background.wait(last=True)
    assert most == [1]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Five checkpoints, the second of the lowest validation loss."""
    for step, val_loss in ((1, 5.0), (2, 3.0), (3, None), (4, 4.0), (5, None)):
        make(tmp_path, step, val_loss)
    return tmp_path


def make(output_dir: Path, step: int, val_loss: float | None) -> Path:
    partial = checkpoint.begin(output_dir, step, "test")
    (partial / "shard.safetensors").write_bytes(bytes(100))
    files = {"shard.safetensors": checkpoint.describe(partial / "shard.safetensors")}
    checkpoint.seal(partial, files, {"val_loss": val_loss})
    return checkpoint.publish(partial, output_dir, step)


def steps(output_dir: Path) -> list[int]:
    return sorted(step for step, _ in checkpoint.on_disk(output_dir))


def test_the_newest_and_the_best_are_kept(folder: Path) -> None:
    checkpoint.prune(folder, 5, keep=2)
    assert steps(folder) == [2, 4, 5]
    make(folder, 6, 2.5)
    checkpoint.prune(folder, 6, keep=2)
    assert steps(folder) == [5, 6]


def test_only_valid_checkpoints_count(folder: Path) -> None:
    damage(folder, 2, 4)  # the best, and one of the newest
    checkpoint.prune(folder, 5, keep=2)
    assert steps(folder) == [1, 3, 5]  # the best that is sound, and the newest that are


def test_what_is_damaged_is_not_deleted_while_nothing_sound_is_in_its_place(folder: Path) -> None:
    damage(folder, 1, 2, 3, 4)
    checkpoint.prune(folder, 5, keep=2)
    assert steps(folder) == [1, 2, 3, 4, 5]
    make(folder, 6, None)
    checkpoint.prune(folder, 6, keep=2)
    assert steps(folder) == [5, 6]


def damage(output_dir: Path, *damaged: int) -> None:
    for step in damaged:
        (output_dir / f"checkpoints/step-{step:08d}/shard.safetensors").write_bytes(bytes(99))


def test_leftovers_and_strange_names_count_for_nothing(folder: Path) -> None:
    for name in ("step-10.bak", "step-1", ".step-00000009.x.partial", ".step-00000001.deleted", "notes"):
        (folder / "checkpoints" / name).mkdir()
    found, rejected = checkpoint.newest(folder)
    assert found is not None and found.step == 5 and not rejected
    checkpoint.prune(folder, 5, keep=2)
    assert sorted(p.name for p in (folder / "checkpoints").iterdir() if not p.name.startswith("step-0")) == [
        "notes",
        "step-1",
        "step-10.bak",
    ]


def test_a_process_that_outlived_its_run_writes_where_nobody_looks(folder: Path) -> None:
    orphans = checkpoint.begin(folder, 6, "earlier")
    ours = checkpoint.begin(folder, 6, "later")
    (orphans / "shard.safetensors").write_bytes(b"theirs")
    checkpoint.seal(ours, {}, {"val_loss": None})
    (orphans / "more.safetensors").write_bytes(b"theirs")
    checkpoint.publish(ours, folder, 6)
    assert checkpoint.newest(folder)[0] == Checkpoint(folder / "checkpoints/step-00000006", 6, {"val_loss": None})


def test_an_interrupted_deletion_leaves_no_half_checkpoint(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "rmtree", lambda *_, **__: None)  # as if killed before it
    checkpoint.prune(folder, 5, keep=2)
    monkeypatch.undo()
    found, rejected = checkpoint.newest(folder)
    assert steps(folder) == [2, 4, 5] and found is not None and not rejected
    checkpoint.prune(folder, 5, keep=2)
    assert len(list((folder / "checkpoints").iterdir())) == 3


@pytest.mark.parametrize("fault", ["io:enospc:0:14", "io:eio:0:16"])
def test_a_save_that_fails_is_told_and_costs_nothing_else(begin: Any, fault: str) -> None:
    run = begin(1, *PLAIN, fault=fault)
    assert run.process.wait(60) == 0, run.text()
    (warning,) = [line for line in run.text().splitlines() if line.startswith("warning: ")]
    assert warning.startswith("warning: checkpoint of step 8 not saved (injected: ")
    assert warning.endswith(f"; earlier ones are intact; make room or mend it: {run.output_dir}")
    assert steps(run.output_dir) == [4, 12] and run.newest_step() == 12
    assert not list((run.output_dir / "checkpoints").glob(".*"))
    assert len(training_curve(run.output_dir)) == 12


def test_saves_that_keep_failing_end_the_run_with_the_last_checkpoint_intact(
    config_file: Path, tmp_path: Path, run: Run
) -> None:
    """On a real limit: no file may be larger than 100 kB, from the second checkpoint on."""
    assert run("train", config_file, *PLAIN, "num_training_steps=4").returncode == 0
    limit = 100_000
    more = command("train", [config_file, *PLAIN, "num_training_steps=100"])
    done = subprocess.run(
        more,
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )
    assert done.returncode == 6 and done.stderr.count("\n") == 1 and "File too large" in done.stderr
    assert "(3 saves in a row have failed)" in done.stderr
    assert len([line for line in done.stdout.splitlines() if line.startswith("warning: checkpoint of step")]) >= 2
    found, rejected = checkpoint.newest(tmp_path / "run")
    assert found is not None and found.step == 4 and not rejected
    assert run("train", config_file, *PLAIN, "num_training_steps=12").returncode == 0
    assert [step for step, _, _ in training_curve(tmp_path / "run")] == list(range(1, 13))


def test_a_bug_in_a_save_is_no_success(begin: Any) -> None:
    run = begin(1, *PLAIN, "num_training_steps=6", fault="checkpoint.seal:raise:0:2")
    assert run.process.wait(60) == 1 and "RuntimeError: injected" in run.text()
    assert run.newest_step() == 4 and run.status()["state"] == "failed"


@pytest.mark.parametrize("fault", ["checkpoint.describe:eio:0:5", "saver.HuggingFaceStorageWriter.write_data:oom:0:2"])
def test_whatever_keeps_a_checkpoint_from_being_written_or_read_back_is_a_failed_save(begin: Any, fault: str) -> None:
    run = begin(1, *PLAIN, fault=fault)
    assert run.process.wait(60) == 0, run.text()
    assert len([line for line in run.text().splitlines() if line.startswith("warning: checkpoint of step")]) == 1
    assert run.newest_step() == 12


def test_a_new_checkpoint_that_does_not_read_back_costs_no_older_one(folder: Path) -> None:
    damage(folder, 5)
    with pytest.raises(CheckpointError, match="step-00000005/shard"):
        checkpoint.prune(folder, 5, keep=2)
    assert steps(folder) == [1, 2, 3, 4, 5]


def test_a_loss_that_is_no_number_is_never_the_best(folder: Path) -> None:
    make(folder, 6, float("nan"))
    checkpoint.prune(folder, 6, keep=2)
    assert steps(folder) == [2, 5, 6]


def test_a_last_save_that_fails_is_no_success(begin: Any) -> None:
    run = begin(1, *PLAIN, "num_training_steps=6", fault="io:enospc:0:14")
    assert run.process.wait(60) == 6
    assert "checkpoint of step 6 not saved" in run.lines()[0] and run.newest_step() == 4
    assert not (run.output_dir / "eval.json").exists()


def test_a_disk_without_room_for_a_checkpoint_is_refused_at_the_start(
    config_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from distgpt import check
    from distgpt import config as configs

    usage = shutil.disk_usage(tmp_path)
    config = configs.load(config_file)
    for free, expected in ((10**5, "expected 0 MB or more for a checkpoint"), (10**6, None), (10**7, "")):
        monkeypatch.setattr(shutil, "disk_usage", lambda _, free=free: usage._replace(free=free))
        if expected:
            with pytest.raises(MachineError, match=expected):
                check.check(config, False)
        else:
            notes = check.check(config, False).notes
            assert any("checkpoints of" in note for note in notes) == (expected is None)


def test_a_full_disk_stops_neither_the_run_nor_its_record(config_file: Path, tmp_path: Path) -> None:
    """The record of steps meets a limit of its own length, which is then lifted."""
    from distgpt import config as configs
    from distgpt.metrics import Log

    config = configs.load(config_file)
    Path(config.output_dir).mkdir()
    log = Log(config, 0, validated=True, flops_per_token=1, peak=None, ranks=1, wandb_run_id="x")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        for step in range(1, 9):
            resource.setrlimit(resource.RLIMIT_FSIZE, (300 if 2 < step < 7 else soft, hard))
            log.record({"step": step, "padding": "x" * 100})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    log.close()
    assert [row["step"] for row in read_metrics(tmp_path / "run")] == list(range(1, 9))


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_a_failing_rank_costs_all_ranks_the_save_and_no_more(begin: Any, strategy: str) -> None:
    run = begin(2, *PLAIN, f"parallel.strategy={strategy}", "hang_minutes=1", fault="io:enospc:1:3")
    assert run.process.wait(90) == 0, run.text()
    assert any(line.startswith("warning: checkpoint of step 4 not saved (rank 1: ") for line in run.text().splitlines())
    assert steps(run.output_dir) == [8, 12] and run.newest_step() == 12


def test_how_long_the_loop_waited_is_on_record(begin: Any) -> None:
    run = begin(1, *PLAIN)
    assert run.process.wait(60) == 0
    waits = [row for row in read_metrics(run.output_dir) if "checkpoint-wait-seconds" in row]
    assert [row["step"] for row in waits] == [4, 8, 12]
    state = json.loads((run.output_dir / "checkpoints/step-00000012/state.json").read_text())
    assert state["platform"]["ranks"] == 1 and state["val_loss"] is None
