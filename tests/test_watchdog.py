"""Signals, time limits, lost ranks and launchers, hangs and crashes, on real processes; the output folder's lock."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from distgpt.errors import CrashLoopError
from distgpt.resilience.run_lock import RunLock
from tests.conftest import Run, environment, read_metrics, training_curve
from tests.started import PLAIN, alive, handles_signals, processes_in
from tests.test_train import hashes

ENDLESS = (*PLAIN, "num_training_steps=1000000", "checkpoint.every=7", "log_every=1", "eval.every=1000000")
"""Runs until it is stopped."""


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGUSR1", "SIGUSR2"])
def test_a_signal_saves_the_step_and_exits_with_75(begin: Any, name: str) -> None:
    run = begin(1, *ENDLESS)
    run.wait_for_steps(3)
    run.process.send_signal(getattr(signal, name))
    assert run.process.wait(30) == 75
    step = run.newest_step()
    assert run.lines() == [f"distgpt: stopped after step {step} ({name}), everything saved; the same command resumes"]
    assert (run.status()["state"], run.status()["step"], run.status()["code"]) == ("stopped", step, 75)
    assert training_curve(run.output_dir)[-1][0] == step  # every step is saved, and none recorded that was not made


@pytest.mark.parametrize(("ranks", "strategy"), [(1, "auto"), pytest.param(2, "fsdp", marks=pytest.mark.slow)])
def test_resume_is_bit_identical_after_a_stop(begin: Any, tmp_path: Path, run: Run, ranks: int, strategy: str) -> None:
    steps = ("num_training_steps=60", "checkpoint.every=100", "log_every=1")
    arguments = (*PLAIN, *steps, "p_dropout=0.1", f"parallel.strategy={strategy}")
    stopped = begin(ranks, *arguments)
    stopped.wait_for_steps(5)
    for pid in stopped.ranks().values() if ranks > 1 else [stopped.process.pid]:
        os.kill(pid, signal.SIGTERM)
    assert stopped.process.wait(60) == (75 if ranks == 1 else 0)  # torchrun would restart ranks that exit with 75
    assert stopped.status()["code"] == 75 and stopped.newest_step() < 60
    assert run("train", tmp_path / "tiny.yaml", *arguments, ranks=ranks).returncode == 0
    whole = tmp_path / "whole"
    assert run("train", tmp_path / "tiny.yaml", *arguments, f"output_dir={whole}", ranks=ranks).returncode == 0
    assert training_curve(tmp_path / "run") == training_curve(whole)
    assert hashes(tmp_path / "run", 60) == hashes(whole, 60)


def test_a_signal_during_start_up_stops_the_run(begin: Any) -> None:
    run = begin(1, *ENDLESS)
    run.wait_until(lambda: handles_signals(run.process.pid))
    run.process.send_signal(signal.SIGTERM)  # torch is being imported
    assert run.process.wait(60) == 75
    assert run.lines() == ["distgpt: stopped after step 0 (SIGTERM), everything saved; the same command resumes"]


@pytest.mark.parametrize("target", ["one rank", "torchrun"])
def test_a_signal_during_start_up_stops_all_ranks(begin: Any, target: str) -> None:
    run = begin(2, *ENDLESS, "compile=on")
    run.wait_until(lambda: len(run.ranks()) == 2 and all(map(handles_signals, run.ranks().values())))
    os.kill(run.ranks()[1] if target == "one rank" else run.process.pid, signal.SIGTERM)
    assert run.process.wait(60) == (0 if target == "one rank" else 1)
    assert run.lines() == ["distgpt: stopped after step 0 (SIGTERM), everything saved; the same command resumes"]
    assert not processes_in(run.folder)


def test_a_second_signal_exits_at_once(begin: Any) -> None:
    run = begin(1, *ENDLESS)
    run.wait_until(lambda: handles_signals(run.process.pid))
    run.process.send_signal(signal.SIGINT)
    time.sleep(0.7)  # longer than torchrun takes to forward a terminal's signal
    run.process.send_signal(signal.SIGINT)
    assert run.process.wait(1) == 130
    assert run.lines() == [
        "distgpt: second signal (SIGINT), exiting at once; the same command resumes from the last checkpoint"
    ]


def test_a_time_limit_stops_the_run_like_a_signal(begin: Any) -> None:
    run = begin(1, *ENDLESS, "max_minutes=0.05")
    assert run.process.wait(60) == 75
    assert run.status()["reason"] == "time limit" and run.status()["step"] == run.newest_step() > 0


@pytest.mark.parametrize("target", ["one rank", "torchrun"])
def test_all_ranks_stop_at_the_same_step(begin: Any, target: str) -> None:
    run = begin(3, *ENDLESS)
    run.wait_for_steps(3)
    os.kill(run.ranks()[1] if target == "one rank" else run.process.pid, signal.SIGTERM)
    assert run.process.wait(30) == (0 if target == "one rank" else 1)  # torchrun's own exit code after a signal
    assert run.status()["step"] == run.newest_step() and run.status()["code"] == 75
    assert len(run.lines()) == 1 and "everything saved" in run.lines()[0]


def test_survivors_of_a_killed_rank_name_it_and_exit(begin: Any) -> None:
    run = begin(3, *ENDLESS, "parallel.strategy=fsdp")
    run.wait_for_checkpoint()
    os.kill(run.ranks()[1], signal.SIGKILL)
    assert run.process.wait(30) == 1
    assert run.status()["code"] == 76 and run.status()["reason"] == "rank 1 is lost: no heartbeat for 4 s"
    step = run.newest_step()
    assert len(run.lines()) == 2
    for line in run.lines():
        assert "rank 1 is lost" in line
        assert line.endswith(f"the same command resumes from the checkpoint of step {step}")


def test_ranks_exit_when_their_launcher_is_killed(begin: Any) -> None:
    run = begin(2, *ENDLESS)
    run.wait_for_steps(3)
    pids = list(run.ranks().values())
    assert len(pids) == 2
    os.kill(run.process.pid, signal.SIGKILL)
    deadline = time.monotonic() + 5
    while any(map(alive, pids)):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert run.status()["code"] == 76 and "is gone" in run.status()["reason"]


def test_ranks_exit_when_their_launcher_is_killed_during_start_up(begin: Any) -> None:
    run = begin(2, *ENDLESS)
    run.wait_until(lambda: len(run.ranks()) == 2 and all(map(handles_signals, run.ranks().values())))
    os.kill(run.process.pid, signal.SIGKILL)  # torch is being imported
    run.process.wait()
    deadline = time.monotonic() + 5
    while processes_in(run.folder):
        assert time.monotonic() < deadline, run.text()
        time.sleep(0.1)
    assert run.text().count("is gone; run the same command again") == 2


def test_ranks_whose_launcher_was_killed_before_they_could_notice_do_not_wait_for_each_other(begin: Any) -> None:
    run = begin(2, *ENDLESS)
    run.wait_until(lambda: len(run.ranks()) == 2)
    os.kill(run.process.pid, signal.SIGKILL)  # Python is starting: no rank watches its launcher yet
    run.process.wait()
    deadline = time.monotonic() + 60  # most of it to import torch, while other processes use the processors too
    while processes_in(run.folder):
        assert time.monotonic() < deadline, run.text()
        time.sleep(0.1)


@pytest.mark.slow
def test_a_hang_ends_the_run_with_stacks_and_the_silent_rank(begin: Any) -> None:
    run = begin(3, *ENDLESS, "hang_minutes=0.3")
    run.wait_for_steps(3)
    os.kill(run.ranks()[2], signal.SIGSTOP)
    assert run.process.wait(90) == 1  # torchrun gives a suspended rank 30 s
    assert len(run.lines()) == 2 and all(
        re.search(r"no progress for 18 s, .*; rank 2 is lost", line) for line in run.lines()
    )
    for rank in (0, 1):
        assert "in run_loop" in (run.output_dir / f"stacks-rank-{rank}.txt").read_text()  # wherever in it they wait
    assert run.status()["code"] == 76


def test_a_run_that_was_suspended_and_continued_has_not_hung(begin: Any) -> None:
    run = begin(1, *ENDLESS, "hang_minutes=0.1")
    run.wait_for_steps(3)
    run.process.send_signal(signal.SIGSTOP)
    time.sleep(8)  # more than hang_minutes
    run.process.send_signal(signal.SIGCONT)
    run.wait_for_steps(run.recorded() + 3)
    time.sleep(2)  # the watchdog looks twice a second
    run.process.send_signal(signal.SIGTERM)
    assert run.process.wait(30) == 75, run.text()


def test_a_second_run_in_the_same_folder_is_refused(begin: Any, tmp_path: Path, run: Run) -> None:
    first = begin(1, *ENDLESS)
    first.wait_for_steps(2)
    status_before = (tmp_path / "run" / "status.json").read_bytes()
    second = run("train", tmp_path / "tiny.yaml", *ENDLESS)
    assert second.returncode == 6 and second.stderr.count("\n") == 1
    assert f"is in use by process {first.process.pid} on " in second.stderr
    assert (tmp_path / "run" / "status.json").read_bytes() == status_before
    os.kill(first.process.pid, signal.SIGKILL)
    first.process.wait()
    third = run("train", tmp_path / "tiny.yaml", *ENDLESS, "max_minutes=0.02")  # the first run's lock is gone
    assert third.returncode == 75


@pytest.mark.parametrize(
    ("point", "ranks"),
    [
        ("training.step.train_step", 2),
        pytest.param("data.dataloader.TrainLoader.micro_batches", 2, marks=pytest.mark.slow),
        pytest.param("training.step.clip_gradients", 3, marks=pytest.mark.slow),
        pytest.param("data.dataloader.validation_batches", 2, marks=pytest.mark.slow),
        pytest.param("checkpoint.saver.write_checkpoint", 2, marks=pytest.mark.slow),
        pytest.param("checkpoint.saver.Saver.save", 3, marks=pytest.mark.slow),
        pytest.param("distributed.runtime.resolve_runtime", 2, marks=pytest.mark.slow),
        pytest.param("training.step.warm_up", 2, marks=pytest.mark.slow),
    ],
)
def test_an_exception_on_one_rank_ends_all_ranks_which_report_it_as_the_cause(
    begin: Any, point: str, ranks: int
) -> None:
    run = begin(ranks, *ENDLESS, "eval.every=2", fault=f"{point}:raise:1")
    assert run.process.wait(60) == 1
    assert "RuntimeError: injected" in run.text()
    others = [line for line in run.lines() if "rank 1 failed: " in line]
    assert len(others) == ranks - 1 and all("injected" in line for line in others), run.text()
    assert run.status()["code"] == 76 and not processes_in(run.folder)


@pytest.mark.parametrize("rank", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_an_error_outside_of_collectives_ends_all_ranks_too(begin: Any, rank: int) -> None:
    point = "training.metrics.MetricLogger.log_step"
    if rank == 1:
        point = "resilience.watchdog.Watchdog.raise_if_stop_requested"
    run = begin(2, *ENDLESS, fault=f"{point}:raise:{rank}:3")
    assert run.process.wait(60) == 1
    assert [line for line in run.lines() if f"rank {rank} failed: RuntimeError: injected" in line], run.text()
    assert run.status()["state"] == "failed"


@pytest.mark.slow
@pytest.mark.parametrize(
    "point",
    [
        "models.gpt2.DecoderLM.forward",
        "training.step.clip_gradients",
        "data.dataloader.validation_batches",
        "checkpoint.saver.write_checkpoint",
        "checkpoint.store.file_digest",
        "distributed.parallelize.parallelize",
    ],
)
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_a_rank_killed_in_any_phase_is_named_by_the_others(begin: Any, point: str, strategy: str) -> None:
    run = begin(3, *ENDLESS, "eval.every=2", f"parallel.strategy={strategy}", fault=f"{point}:kill:1:2")
    if point == "distributed.parallelize.parallelize":  # called once
        run.end()
        run = begin(3, *ENDLESS, f"parallel.strategy={strategy}", fault=f"{point}:kill:1:1")
    assert run.process.wait(60) == 1
    assert len(run.lines()) == 2 and all("rank 1 is lost" in line for line in run.lines()), run.text()
    assert run.status()["code"] == 76 and not processes_in(run.folder)
    run.newest_step()


@pytest.mark.slow
def test_a_rank_that_sleeps_is_found_and_its_stack_is_written(begin: Any) -> None:
    run = begin(2, *ENDLESS, "hang_minutes=0.3", fault="training.step.train_step:sleep:1:5")
    assert run.process.wait(60) == 1
    assert any(re.search(r"rank 1, .*no progress for 18 s, in sleep \(faulty.py", line) for line in run.lines()), (
        run.text()
    )
    assert "in sleep" in (run.output_dir / "stacks-rank-1.txt").read_text()
    assert run.status()["code"] == 76


def test_running_out_of_memory_in_a_step_ends_with_a_hint(begin: Any) -> None:
    run = begin(1, *PLAIN, fault="training.step.train_step:oom:0:6")
    assert run.process.wait(60) == 6
    assert run.lines() == [
        "distgpt: error: injected; lower batch_size (keeping global_batch_size) or the size of the model",
    ]
    assert run.newest_step() == 4 and run.status()["step"] == 5


@pytest.mark.parametrize("rank", [0, 1])
def test_a_non_finite_gradient_on_one_rank_is_skipped_by_all_ranks(begin: Any, rank: int) -> None:
    fault = f"models.gpt2.DecoderLM.forward:nan:{rank}:7"  # the sixth step: one call warms up
    run = begin(2, *PLAIN, "eval.every=1000", fault=fault)
    assert run.process.wait(60) == 0, run.text()
    rows = [row for row in read_metrics(run.output_dir) if "skipped" in row]
    assert [row["skipped"] for row in rows] == [0] * 5 + [1] * 7
    assert all(row["train-loss"] is not None for row in rows[6:])
    state = json.loads((run.output_dir / "checkpoints/step-00000012/state.json").read_text())
    assert state["progress"]["skipped"] == [1.0, 0.0]


@pytest.mark.parametrize(("ranks", "who"), [(3, "rank 1 holds"), (2, "ranks 0 and 1 hold")])
def test_a_flipped_bit_in_one_replica_ends_the_run_before_it_is_saved(begin: Any, ranks: int, who: str) -> None:
    run = begin(ranks, *PLAIN, fault="distributed.replica_check.check_replicas:flip:1:2")
    assert run.process.wait(60) == 1
    (line,) = run.lines()
    assert line.startswith(f"distgpt: error: step 8: {who} different weights")
    assert run.status()["code"] == 5 and run.newest_step() == 4


def test_torchrun_recovers_from_a_lost_rank_with_identical_bits(begin: Any, tmp_path: Path, run: Run) -> None:
    arguments = (*PLAIN, "p_dropout=0.1", "num_training_steps=50")
    fault = "training.step.seed_dropout:kill:1:step=41"
    lost = begin(2, *arguments, fault=fault, torchrun_options=("--max-restarts=3",))
    assert lost.process.wait(90) == 0, lost.text()
    assert re.search("resume  .*: after step 3[26]\n", lost.text())  # the save after 36 may have been in progress
    whole = tmp_path / "whole"
    assert run("train", tmp_path / "tiny.yaml", *arguments, f"output_dir={whole}", ranks=2).returncode == 0
    assert training_curve(lost.output_dir) == training_curve(whole)
    assert hashes(lost.output_dir, 50) == hashes(whole, 50)


@pytest.mark.slow
def test_crashes_at_the_same_step_end_the_restarts_until_the_user_runs_it_again(
    begin: Any, tmp_path: Path, run: Run
) -> None:
    fault = "training.step.seed_dropout:kill:1:step=41:always"
    loop = begin(2, *PLAIN, "num_training_steps=50", fault=fault, torchrun_options=("--max-restarts=5",))
    assert loop.process.wait(180) == 1
    refusals = [line for line in loop.lines() if "3 crashes in a row at step 41" in line]
    assert len(refusals) == 3  # torchrun's remaining restarts
    assert "(the last: rank 1 is lost: no heartbeat for 4 s), expected progress" in refusals[0]
    assert loop.status()["code"] == 93 and loop.newest_step() in (36, 40)
    assert run("train", tmp_path / "tiny.yaml", *PLAIN, "num_training_steps=50", ranks=2).returncode == 0


def test_only_crashes_at_the_same_step_are_counted_and_kills_of_the_whole_run_are_not(tmp_path: Path) -> None:
    def run_until(step: int, state: str, restart_count: int = 0) -> None:
        lock = RunLock(tmp_path, restart_count)
        lock.record_step(step)
        lock.write_status(state, step, "why")
        lock.release()

    def is_refused(restart_count: int) -> bool:
        try:
            RunLock(tmp_path, restart_count).release()
        except CrashLoopError as error:
            assert error.exit_code == 93 and "fix the cause, then run the same command again" in str(error)
            return True
        return False

    for step in (7, 9, 7):
        run_until(step, "failed")
    for _ in range(5):
        run_until(7, "running")  # killed together with its launcher: neither a crash nor a reason to reset the count
    run_until(0, "failed")  # before its first step: not at that step
    run_until(7, "failed")
    run_until(7, "stopped")  # an orderly end: the count starts over
    for _ in range(3):
        assert not is_refused(0)
        run_until(7, "failed")
    assert is_refused(1) and is_refused(2)  # torchrun restarts it
    assert not is_refused(0)


def test_a_run_stopped_during_validation_repeats_the_validation(begin: Any, tmp_path: Path, run: Run) -> None:
    """Its metrics and weights are those of a run that was not stopped."""
    arguments = (*PLAIN, "batch_size=1", "global_batch_size=8", "eval.every=3", "eval.max_tokens=999")
    stopped = begin(1, *arguments, fault="data.dataloader.validation_batches:term:0:2")
    assert stopped.process.wait(60) == 75
    assert stopped.status()["step"] == 6 and [r["step"] for r in validations(stopped.output_dir)] == [3]
    assert run("train", tmp_path / "tiny.yaml", *arguments).returncode == 0
    whole = tmp_path / "whole"
    assert run("train", tmp_path / "tiny.yaml", *arguments, f"output_dir={whole}").returncode == 0
    assert [r["step"] for r in validations(whole)] == [3, 6, 9, 12]
    assert validations(stopped.output_dir) == validations(whole)
    assert training_curve(stopped.output_dir) == training_curve(whole)
    assert hashes(stopped.output_dir, 12) == hashes(whole, 12)


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_run_stopped_during_its_last_validation_has_saved_its_last_step(begin: Any, ranks: int) -> None:
    """The save of that step may still be running in the background when the run is stopped."""
    few = ("batch_size=1", "global_batch_size=8", "eval.every=1000", "checkpoint.every=1000")
    stopped = begin(ranks, *PLAIN, *few, fault="data.dataloader.validation_batches:term")
    assert stopped.process.wait(60) == (75 if ranks == 1 else 0)
    assert stopped.status()["code"] == 75 and stopped.newest_step() == stopped.status()["step"] == 12


def test_a_run_started_with_fresh_resumes_when_torchrun_restarts_it(begin: Any) -> None:
    run = begin(
        2,
        *PLAIN,
        "num_training_steps=50",
        "--fresh",
        fault="training.step.seed_dropout:kill:1:step=41",
        torchrun_options=("--max-restarts=1",),
    )
    assert run.process.wait(120) == 0, run.text()
    assert re.search("resume  .*: after step 3[26]\n", run.text())


TWO_RANKS_PRINT = """
import os
from distgpt.resilience.signals import eprint
for line in range(2000):
    eprint(f"rank {os.environ['RANK']}: " + "x" * 50)
"""


def test_lines_of_several_ranks_do_not_mix() -> None:
    """Each line goes out in one write, also without buffering."""
    read_fd, write_fd = os.pipe()
    processes = [
        subprocess.Popen([sys.executable, *flags, "-c", TWO_RANKS_PRINT], env=environment(RANK=rank), stderr=write_fd)
        for rank, flags in (("0", []), ("1", ["-u"]))
    ]
    os.close(write_fd)
    with os.fdopen(read_fd) as stream:
        lines = stream.read().splitlines()
    assert [process.wait() for process in processes] == [0, 0]
    assert sorted(lines) == [f"rank {rank}: " + "x" * 50 for rank in (0, 1) for _ in range(2000)]


def validations(output_dir: Path) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl that hold a validation."""
    return [row for row in read_metrics(output_dir) if "val-loss" in row]
