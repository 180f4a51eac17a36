"""Signals, time limits, lost peers and launchers, hangs and crashes, on real processes; the lock on the folder."""

from __future__ import annotations

import json
import os
import re
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from distgpt.errors import CrashLoopError
from distgpt.lock import Lock
from tests.conftest import Run, read_metrics, training_curve
from tests.started import PLAIN, alive, listens, processes_in
from tests.test_train import hashes

ENDLESS = (*PLAIN, "num_training_steps=1000000", "checkpoint.every=7", "log_every=1", "eval.every=1000000")


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGUSR1", "SIGUSR2"])
def test_a_signal_saves_the_step_and_exits_75(begin: Any, name: str) -> None:
    run = begin(1, *ENDLESS)
    run.wait_for_steps(3)
    run.process.send_signal(getattr(signal, name))
    assert run.process.wait(30) == 75
    step = run.newest_step()
    assert run.lines() == [f"distgpt: stopped after step {step} ({name}), everything saved; the same command goes on"]
    assert (run.status()["state"], run.status()["step"], run.status()["code"]) == ("stopped", step, 75)
    assert training_curve(run.output_dir)[-1][0] == step  # no step is lost, none recorded that was not made


@pytest.mark.parametrize(("ranks", "strategy"), [(1, "auto"), pytest.param(2, "fsdp", marks=pytest.mark.slow)])
def test_stopped_and_started_again_it_ends_bit_for_bit_the_same(
    begin: Any, tmp_path: Path, run: Run, ranks: int, strategy: str
) -> None:
    steps = ("num_training_steps=60", "checkpoint.every=100", "log_every=1")
    arguments = (*PLAIN, *steps, "p_dropout=0.1", f"parallel.strategy={strategy}")
    stopped = begin(ranks, *arguments)
    stopped.wait_for_steps(5)
    for pid in stopped.ranks().values() if ranks > 1 else [stopped.process.pid]:
        os.kill(pid, signal.SIGTERM)
    assert stopped.process.wait(60) == (75 if ranks == 1 else 0)  # under bare torchrun, which would start it again
    assert stopped.status()["code"] == 75 and stopped.newest_step() < 60
    assert run("train", tmp_path / "tiny.yaml", *arguments, ranks=ranks).returncode == 0
    whole = tmp_path / "whole"
    assert run("train", tmp_path / "tiny.yaml", *arguments, f"output_dir={whole}", ranks=ranks).returncode == 0
    assert training_curve(tmp_path / "run") == training_curve(whole)
    assert hashes(tmp_path / "run", 60) == hashes(whole, 60)


def test_a_signal_while_it_starts_is_heard(begin: Any) -> None:
    run = begin(1, *ENDLESS)
    time.sleep(0.7)  # torch is being imported
    run.process.send_signal(signal.SIGTERM)
    assert run.process.wait(60) == 75
    assert run.lines() == ["distgpt: stopped after step 0 (SIGTERM), everything saved; the same command goes on"]


def test_a_second_signal_ends_it_at_once(begin: Any) -> None:
    run = begin(1, *ENDLESS)
    time.sleep(0.7)
    run.process.send_signal(signal.SIGINT)
    time.sleep(0.7)
    run.process.send_signal(signal.SIGINT)
    assert run.process.wait(1) == 130
    assert run.lines() == ["distgpt: SIGINT again: leaving at once; the run goes on from its last checkpoint"]


def test_a_time_limit_stops_it_like_a_signal(begin: Any) -> None:
    run = begin(1, *ENDLESS, "max_minutes=0.05")
    assert run.process.wait(60) == 75
    assert run.status()["reason"] == "time limit" and run.status()["step"] == run.newest_step() > 0


@pytest.mark.parametrize("target", ["one rank", "torchrun"])
def test_all_ranks_stop_at_one_step(begin: Any, target: str) -> None:
    run = begin(3, *ENDLESS)
    run.wait_for_steps(3)
    os.kill(run.ranks()[1] if target == "one rank" else run.process.pid, signal.SIGTERM)
    assert run.process.wait(30) == (0 if target == "one rank" else 1)  # torchrun's own code when it is told to stop
    assert run.status()["step"] == run.newest_step() and run.status()["code"] == 75
    assert len(run.lines()) == 1 and "everything saved" in run.lines()[0]


def test_survivors_of_a_killed_rank_name_it_and_leave(begin: Any) -> None:
    run = begin(3, *ENDLESS, "parallel.strategy=fsdp")
    run.wait_for_checkpoint()
    os.kill(run.ranks()[1], signal.SIGKILL)
    assert run.process.wait(30) == 1
    assert run.status()["code"] == 76 and run.status()["reason"] == "rank 1 is lost: it gives no sign of life"
    step = run.newest_step()
    assert len(run.lines()) == 2
    for line in run.lines():
        assert "rank 1 is lost" in line
        assert line.endswith(f"the same command goes on from the checkpoint of step {step}")


def test_workers_do_not_outlive_their_launcher(begin: Any) -> None:
    run = begin(2, *ENDLESS)
    run.wait_for_steps(3)
    workers = list(run.ranks().values())
    assert len(workers) == 2
    os.kill(run.process.pid, signal.SIGKILL)
    deadline = time.monotonic() + 5
    while any(map(alive, workers)):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert run.status()["code"] == 76 and "is gone" in run.status()["reason"]


def test_workers_do_not_outlive_a_launcher_that_dies_while_they_start(begin: Any) -> None:
    run = begin(2, *ENDLESS)
    run.wait_until(lambda: len(run.ranks()) == 2 and all(map(listens, run.ranks().values())))
    os.kill(run.process.pid, signal.SIGKILL)  # torch is being imported
    run.process.wait()
    deadline = time.monotonic() + 5
    while processes_in(run.folder):
        assert time.monotonic() < deadline, run.text()
        time.sleep(0.1)
    assert len(run.lines()) == 2 and all("is gone; run the same command again" in line for line in run.lines())


def test_workers_whose_launcher_died_before_they_could_notice_do_not_wait_for_each_other(begin: Any) -> None:
    run = begin(2, *ENDLESS)
    run.wait_until(lambda: len(run.ranks()) == 2)
    os.kill(run.process.pid, signal.SIGKILL)  # Python is starting: nobody watches yet
    run.process.wait()
    deadline = time.monotonic() + 60  # most of it to import torch, where others use the processors too
    while processes_in(run.folder):
        assert time.monotonic() < deadline, run.text()
        time.sleep(0.1)


@pytest.mark.slow
def test_a_hang_ends_the_run_with_stacks_and_the_silent_rank(begin: Any) -> None:
    run = begin(3, *ENDLESS, "hang_minutes=0.3")
    run.wait_for_steps(3)
    os.kill(run.ranks()[2], signal.SIGSTOP)
    assert run.process.wait(90) == 1  # torchrun gives a stopped rank 30 s
    assert len(run.lines()) == 2 and all(
        re.search(r"no progress for 18 s, .*; rank 2 is lost", line) for line in run.lines()
    )
    for rank in (0, 1):
        assert "in loop" in (run.output_dir / f"stacks-rank-{rank}.txt").read_text()  # wherever in it they wait
    assert run.status()["code"] == 76


def test_a_run_that_was_stopped_and_continued_did_not_hang(begin: Any) -> None:
    run = begin(1, *ENDLESS, "hang_minutes=0.1")
    run.wait_for_steps(3)
    run.process.send_signal(signal.SIGSTOP)
    time.sleep(8)  # more than hang_minutes
    run.process.send_signal(signal.SIGCONT)
    run.wait_for_steps(run.recorded() + 3)
    time.sleep(2)  # the supervisor looks twice a second
    run.process.send_signal(signal.SIGTERM)
    assert run.process.wait(30) == 75, run.text()


def test_a_second_run_in_one_folder_is_refused(begin: Any, tmp_path: Path, run: Run) -> None:
    first = begin(1, *ENDLESS)
    first.wait_for_steps(2)
    before = (tmp_path / "run" / "status.json").read_bytes()
    second = run("train", tmp_path / "tiny.yaml", *ENDLESS)
    assert second.returncode == 6 and second.stderr.count("\n") == 1
    assert f"is in use by process {first.process.pid} on " in second.stderr
    assert (tmp_path / "run" / "status.json").read_bytes() == before
    os.kill(first.process.pid, signal.SIGKILL)
    first.process.wait()
    third = run("train", tmp_path / "tiny.yaml", *ENDLESS, "max_minutes=0.02")  # its lock is stale
    assert third.returncode == 75


@pytest.mark.parametrize(
    ("point", "ranks"),
    [
        ("step.train_step", 2),
        pytest.param("data.ShuffledReader.at", 2, marks=pytest.mark.slow),
        pytest.param("parallel.Running.clip_gradients", 3, marks=pytest.mark.slow),
        pytest.param("evaluate.held_out_batches", 2, marks=pytest.mark.slow),
        pytest.param("saver.write", 2, marks=pytest.mark.slow),
        pytest.param("saver.Saver.save", 3, marks=pytest.mark.slow),
        pytest.param("parallel.decide", 2, marks=pytest.mark.slow),
        pytest.param("step.warm_up", 2, marks=pytest.mark.slow),
    ],
)
def test_an_exception_on_one_rank_ends_all_with_that_ranks_line_as_the_cause(
    begin: Any, point: str, ranks: int
) -> None:
    run = begin(ranks, *ENDLESS, "eval.every=2", fault=f"{point}:raise:1")
    assert run.process.wait(60) == 1
    assert "RuntimeError: injected" in run.text()
    others = [line for line in run.lines() if "rank 1 failed: " in line]
    assert len(others) == ranks - 1 and all("injected" in line for line in others), run.text()
    assert run.status()["code"] == 76 and not processes_in(run.folder)


@pytest.mark.parametrize("rank", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_what_only_one_rank_writes_ends_all_ranks_too(begin: Any, rank: int) -> None:
    point = "metrics.Log.step" if rank == 0 else "supervise.Supervisor.obey"
    run = begin(2, *ENDLESS, fault=f"{point}:raise:{rank}:3")
    assert run.process.wait(60) == 1
    assert [line for line in run.lines() if f"rank {rank} failed: RuntimeError: injected" in line], run.text()
    assert run.status()["state"] == "failed"


@pytest.mark.slow
@pytest.mark.parametrize(
    "point",
    [
        "parallel.Running.__call__",
        "parallel.Running.clip_gradients",
        "evaluate.held_out_batches",
        "saver.write",
        "checkpoint.describe",
        "parallel.parallelize",
    ],
)
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_a_rank_killed_in_any_phase_is_named_by_the_others(begin: Any, point: str, strategy: str) -> None:
    run = begin(3, *ENDLESS, "eval.every=2", f"parallel.strategy={strategy}", fault=f"{point}:kill:1:2")
    if point == "parallel.parallelize":
        run.end()
        run = begin(3, *ENDLESS, f"parallel.strategy={strategy}", fault=f"{point}:kill:1:1")
    assert run.process.wait(60) == 1
    assert len(run.lines()) == 2 and all("rank 1 is lost" in line for line in run.lines()), run.text()
    assert run.status()["code"] == 76 and not processes_in(run.folder)
    run.newest_step()


@pytest.mark.slow
def test_a_rank_that_sleeps_is_found_and_its_stack_tells_where(begin: Any) -> None:
    run = begin(2, *ENDLESS, "hang_minutes=0.3", fault="step.train_step:sleep:1:5")
    assert run.process.wait(60) == 1
    assert any(re.search(r"rank 1, .*no progress for 18 s, in sleep \(faulty.py", line) for line in run.lines()), (
        run.text()
    )
    assert "in sleep" in (run.output_dir / "stacks-rank-1.txt").read_text()
    assert run.status()["code"] == 76


def test_memory_that_runs_out_in_a_step_ends_with_a_hint(begin: Any) -> None:
    run = begin(1, *PLAIN, fault="step.train_step:oom:0:6")
    assert run.process.wait(60) == 6
    assert run.lines() == [
        "distgpt: error: injected; lower batch_size (the result stays the same) or the model",
    ]
    assert run.newest_step() == 4 and run.status()["step"] == 5


@pytest.mark.parametrize("rank", [0, 1])
def test_a_gradient_that_is_no_number_on_one_rank_is_skipped_by_all(begin: Any, rank: int) -> None:
    run = begin(2, *PLAIN, fault=f"parallel.Running.__call__:nan:{rank}:7")  # the sixth step: one call warms up
    assert run.process.wait(60) == 0, run.text()
    rows = [row for row in read_metrics(run.output_dir) if "skipped" in row]
    assert [row["skipped"] for row in rows] == [0] * 5 + [1] * 7
    assert all(row["train-loss"] is not None for row in rows[6:])
    state = json.loads((run.output_dir / "checkpoints/step-00000012/state.json").read_text())
    assert state["skipped"] == [1.0, 0.0]


@pytest.mark.parametrize(("ranks", "who"), [(3, "rank 1 holds"), (2, "ranks 0 and 1 hold")])
def test_a_flipped_bit_in_one_replica_ends_the_run_before_it_is_saved(begin: Any, ranks: int, who: str) -> None:
    run = begin(ranks, *PLAIN, fault="parallel.Running.check_replicas:flip:1:2")
    assert run.process.wait(60) == 1
    (line,) = run.lines()
    assert line.startswith(f"distgpt: error: step 8: {who} other weights than the rest")
    assert run.status()["code"] == 5 and run.newest_step() == 4


def test_torchrun_recovers_from_a_lost_rank_without_a_hand(begin: Any, tmp_path: Path, run: Run) -> None:
    """And ends bit for bit as the run that lost none."""
    arguments = (*PLAIN, "p_dropout=0.1", "num_training_steps=50")
    lost = begin(2, *arguments, fault="step.seed_dropout:kill:1:step=41", torchrun_options=("--max-restarts=3",))
    assert lost.process.wait(90) == 0, lost.text()
    assert re.search("going on after step 3[26]", lost.text())  # the save after 36 may have been under way
    whole = tmp_path / "whole"
    assert run("train", tmp_path / "tiny.yaml", *arguments, f"output_dir={whole}", ranks=2).returncode == 0
    assert training_curve(lost.output_dir) == training_curve(whole)
    assert hashes(lost.output_dir, 50) == hashes(whole, 50)


@pytest.mark.slow
def test_crashes_at_one_step_stop_it_for_good_until_somebody_has_read_why(begin: Any, tmp_path: Path, run: Run) -> None:
    fault = "step.seed_dropout:kill:1:step=41:always"
    loop = begin(2, *PLAIN, "num_training_steps=50", fault=fault, torchrun_options=("--max-restarts=5",))
    assert loop.process.wait(180) == 1
    told = [line for line in loop.lines() if "3 crashes in a row at step 41" in line]
    assert len(told) == 3  # the restarts that torchrun had left
    assert "(the last: rank 1 is lost: it gives no sign of life), expected progress" in told[0]
    assert loop.status()["code"] == 93 and loop.newest_step() in (36, 40)
    assert run("train", tmp_path / "tiny.yaml", *PLAIN, "num_training_steps=50", ranks=2).returncode == 0


def test_crashes_are_counted_at_one_step_only_and_kills_of_the_whole_run_not_at_all(tmp_path: Path) -> None:
    def attempt(step: int, state: str, restarts: int = 0) -> None:
        lock = Lock(tmp_path, restarts)
        lock.at_step(step)
        lock.status(state, step, "why")
        lock.release()

    def refused(restarts: int) -> bool:
        try:
            Lock(tmp_path, restarts).release()
        except CrashLoopError as error:
            assert error.exit_code == 93 and "mend the cause, then run the same command again" in str(error)
            return True
        return False

    for step in (7, 9, 7):
        attempt(step, "failed")
    for _ in range(5):
        attempt(7, "running")  # killed together with its launcher: no crash, and no reason to forget the others
    attempt(0, "failed")  # before its first step: not at that step
    attempt(7, "failed")
    attempt(7, "stopped")  # progress, or at least an orderly end: the count begins anew
    for _ in range(3):
        assert not refused(0)
        attempt(7, "failed")
    assert refused(1) and refused(2)  # torchrun tries in vain
    assert not refused(0)


def test_a_run_stopped_in_a_validation_makes_it_again(begin: Any, tmp_path: Path, run: Run) -> None:
    """Its record is that of a run that was not stopped, and so are its weights."""
    arguments = (*PLAIN, "batch_size=1", "global_batch_size=8", "eval.every=3", "eval.max_tokens=999")
    stopped = begin(1, *arguments, fault="evaluate.held_out_batches:term:0:2")
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
def test_a_run_stopped_in_its_last_validation_has_saved_its_last_step(begin: Any, ranks: int) -> None:
    """The save of that step, in the background, is told to stop with it."""
    few = ("batch_size=1", "global_batch_size=8", "eval.every=1000", "checkpoint.every=1000")
    stopped = begin(ranks, *PLAIN, *few, fault="evaluate.held_out_batches:term")
    assert stopped.process.wait(60) == (75 if ranks == 1 else 0)
    assert stopped.status()["code"] == 75 and stopped.newest_step() == stopped.status()["step"] == 12


def test_started_afresh_it_does_not_start_over_at_every_restart(begin: Any) -> None:
    run = begin(
        2,
        *PLAIN,
        "num_training_steps=50",
        "--fresh",
        fault="step.seed_dropout:kill:1:step=41",
        torchrun_options=("--max-restarts=1",),
    )
    assert run.process.wait(120) == 0, run.text()
    assert re.search("going on after step 3[26]", run.text())


def validations(output_dir: Path) -> list[dict[str, Any]]:
    return [row for row in read_metrics(output_dir) if "val-loss" in row]
