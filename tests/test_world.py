"""Ranks find each other, agree, and fail together."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from distgpt import world as worlds
from distgpt.errors import MachineError
from tests.conftest import REPO, command, environment
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


@pytest.mark.parametrize(("device", "local_rank", "size"), [("cuda", 2, 3), ("auto", 2, 3), ("cuda:2", 0, 1)])
def test_more_ranks_than_gpus_are_refused(
    monkeypatch: pytest.MonkeyPatch, device: str, local_rank: int, size: int
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert worlds.choose_device("cuda", 1, 2) == torch.device("cuda", 1)
    with pytest.raises(
        MachineError, match=r"device: got cuda:2, but this machine has 2 GPU\(s\); start at most one rank"
    ):
        worlds.choose_device(device, local_rank, size)


def test_threads_share_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    alone = worlds.choose_threads(1)
    assert worlds.choose_threads(alone) == 1
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # torchrun's own default does not count as the user's choice
    assert worlds.choose_threads(2) == max(1, alone // 2)
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert worlds.choose_threads(2) == 3
    for nonsense in ("0", "-4", "many", "99999", "\u0663"):
        monkeypatch.setenv("OMP_NUM_THREADS", nonsense)
        assert worlds.choose_threads(1) == alone


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="the system gives a process all processors")
def test_only_the_processors_that_this_process_may_use_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    usable = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(usable)})
        assert worlds.choose_threads(1) == 1
    finally:
        os.sched_setaffinity(0, usable)


@pytest.fixture
def rank_of_two(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Makes this process one of two ranks, at an address where the other never comes."""

    def become(rank: int, address: str, port: int | str) -> None:
        given = {"RANK": rank, "WORLD_SIZE": 2, "LOCAL_RANK": 0, "MASTER_ADDR": address, "MASTER_PORT": port}
        for name, value in given.items():
            monkeypatch.setenv(name, str(value))

    return become


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_alone_names_the_one_that_did_not_come(rank_of_two: Callable[..., None], rank: int) -> None:
    port = free_port()
    rank_of_two(rank, "127.0.0.1", port)
    message = rf"^process group: rank {1 - rank} of 2 did not come to 127\.0\.0\.1:{port} within 0\.3 s, [^\n]*$"
    with pytest.raises(MachineError, match=message) as raised:
        worlds.start("cpu", 0.3)
    assert raised.value.exit_code == 6


@pytest.mark.parametrize("rank", [0, 1])
def test_a_name_that_nobody_has_ends_the_wait_long_before_the_limit(
    rank_of_two: Callable[..., None], monkeypatch: pytest.MonkeyPatch, rank: int
) -> None:
    assert worlds.RESOLVE_SECONDS <= 20
    monkeypatch.setattr(worlds, "RESOLVE_SECONDS", 0.3)
    rank_of_two(rank, "nowhere.invalid", 29500)
    with pytest.raises(MachineError, match=r"could not meet the other ranks at nowhere\.invalid:29500"):
        worlds.start("cpu", 900)


@pytest.mark.parametrize(("rank", "expected"), [(0, "EADDRINUSE"), (1, "what listens there does not answer")])
def test_a_port_that_something_else_has_is_told(rank_of_two: Callable[..., None], rank: int, expected: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        rank_of_two(rank, "127.0.0.1", other.getsockname()[1])
        with pytest.raises(MachineError, match=rf"^process group: [^\n]*{expected}[^\n]*$"):
            worlds.start("cpu", 0.3)


@pytest.mark.parametrize("port", ["", "x", "-1", "65536", "99999999999999999999"])
def test_a_port_that_is_none_is_refused(rank_of_two: Callable[..., None], port: str) -> None:
    rank_of_two(0, "127.0.0.1", port)
    with pytest.raises(MachineError, match=rf"MASTER_PORT='{port}', expected a machine and a port"):
        worlds.start("cpu", 900)


WHEN_BOTH_ARE_THERE = """
import os, time
from pathlib import Path
from distgpt import train
from distgpt.errors import leave, run_command
Path("there-" + os.environ["RANK"]).touch()
while len(list(Path().glob("there-*"))) < 2:
    time.sleep(0.01)
leave(run_command(train.main))
"""
"""Importing torch takes one rank longer than the other: without this, a short limit would have to allow for that."""


def test_two_of_three_ranks_leave_with_code_6_and_name_the_third(config_file: Path, tmp_path: Path) -> None:
    """Started by hand, as on three machines; rank 0 holds the store and still lets rank 1 know."""
    port = free_port()
    started = [
        subprocess.Popen(
            [sys.executable, "-c", WHEN_BOTH_ARE_THERE, str(config_file), "hang_minutes=0.1"],
            cwd=tmp_path,
            env=environment(RANK=str(rank), WORLD_SIZE="3", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)),
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    for process in started:
        _, stderr = process.communicate(timeout=120)
        assert process.returncode == 6, stderr
        assert stderr == (
            f"distgpt: error: process group: rank 2 of 3 did not come to 127.0.0.1:{port} within 6 s, "
            "expected all; start them all, with this MASTER_ADDR and MASTER_PORT\n"
        )
    assert not (tmp_path / "run").exists()


STARTED_AGAIN = """
import os
from pathlib import Path
from distgpt import world as worlds
from distgpt.errors import leave
world = worlds.start("cpu", 60)
Path(f"met-{world.restarts}-{world.rank}").write_text(str(world.gather(world.rank)))
if world.rank == 1 and world.restarts == 0:
    os._exit(9)
world.close()
leave(0)
"""


def test_ranks_that_torchrun_starts_again_meet_again(tmp_path: Path) -> None:
    (tmp_path / "again.py").write_text(STARTED_AGAIN)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=3", "--max-restarts=1"]
    done = subprocess.run(
        [*torchrun, "again.py"], cwd=tmp_path, env=environment(), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert [(tmp_path / f"met-1-{rank}").read_text() for rank in range(3)] == ["[0, 1, 2]"] * 3


def test_ranks_of_other_configs_libraries_or_source_are_refused_with_both_values(
    config_file: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    shutil.copytree(REPO / "distgpt", other / "distgpt", ignore=shutil.ignore_patterns("__pycache__"))
    with (other / "distgpt" / "loss.py").open("a") as file:
        file.write("\n# one line more\n")
    (other / "sitecustomize.py").write_text("import numpy\nnumpy.__version__ = '1.26.0'\n")
    address = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    started = [
        subprocess.Popen(
            command("train", [config_file, f"seed={rank}"]),
            cwd=tmp_path,
            env=environment(RANK=str(rank), PYTHONPATH=str(path), **address),
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank, path in enumerate((REPO, other))
    ]
    for process in started:
        _, stderr = process.communicate(timeout=120)
        assert process.returncode == 2, stderr
        lines = stderr.splitlines()
        assert [line.split(": ")[2] for line in lines] == ["seed", "numpy version", "distgpt's source"]
        assert lines[0].startswith("distgpt: error: seed: rank 0 has 0 and rank 1 has 1, expected the same on every")
        assert f'rank 0 has "{np.__version__}" and rank 1 has "1.26.0"' in lines[1]
    assert not (tmp_path / "run").exists()
