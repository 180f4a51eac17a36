"""Signals, time limits, lost peers and launchers, and hangs, on real processes; the lock on the output folder."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Run, training_curve
from tests.started import PLAIN, Started, alive
from tests.test_train import hashes

ENDLESS = (*PLAIN, "num_training_steps=1000000", "checkpoint.every=7", "log_every=1", "eval.every=1000000")


@pytest.fixture
def begin(config_file: Path, tmp_path: Path) -> Iterator[Any]:
    """Starts runs of the tiny config; kills what is left of them afterwards."""
    started: list[Started] = []

    def start(ranks: int, *arguments: str, **settings: Any) -> Started:
        started.append(Started(tmp_path, ranks, *arguments, **settings))
        return started[-1]

    yield start
    for run in started:
        run.end()


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


@pytest.mark.parametrize(("ranks", "strategy"), [(1, "auto"), (2, "fsdp")])
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


@pytest.mark.slow
def test_a_hang_ends_the_run_with_stacks_and_the_silent_rank(begin: Any) -> None:
    run = begin(3, *ENDLESS, "hang_minutes=0.1")
    run.wait_for_steps(3)
    os.kill(run.ranks()[2], signal.SIGSTOP)
    assert run.process.wait(90) == 1  # torchrun gives a stopped rank 30 s
    assert len(run.lines()) == 2 and all("no progress for 6 s; rank 2 is lost" in line for line in run.lines())
    for rank in (0, 1):
        assert "in loop" in (run.output_dir / f"stacks-rank-{rank}.txt").read_text()  # wherever in it they wait
    assert run.status()["code"] == 76


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
