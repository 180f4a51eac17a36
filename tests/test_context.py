"""Ranks join a process group, agree, and fail together; devices and threads are resolved."""

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

from distgpt.distributed import rendezvous
from distgpt.distributed.context import DistributedContext, init_distributed, resolve_device, resolve_num_threads
from distgpt.errors import RuntimeEnvironmentError
from tests.conftest import REPO, command, environment
from tests.ranks import results


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_an_error_on_one_rank_is_raised_on_every_rank(world_size: int) -> None:
    by_case, _ = results(world_size)
    for result in by_case["agreement"]:
        assert result["raised"][0] == f"DataError: rank {world_size - 1}: no tokens here"
        assert result["raised"][1].startswith("ConfigError: seed: rank 0 has 0 and rank 1 has 1")
        assert result["gathered"] == [{"rank": rank, "text": "x" * rank} for rank in range(world_size)]


MESHES = """
from pathlib import Path
from distgpt.distributed.context import init_distributed
from distgpt.errors import exit_process
context = init_distributed("cpu", 60)
lines = [f"{context.dp_rank} of {context.dp_size}"]
for shard_size in (1, 2, 4):
    with_mesh = context.with_mesh(shard_size)
    replica, shard = with_mesh.mesh["dp_replicate"], with_mesh.mesh["dp_shard"]
    lines.append(f"{with_mesh.dp_rank} of {with_mesh.dp_size} = {replica.get_local_rank()}, {shard.get_local_rank()}")
assert context.mesh is None
Path(f"mesh-{context.rank}").write_text("; ".join(lines))
context.close()
exit_process(0)
"""


def test_data_parallel_rank_and_size_come_from_the_mesh(tmp_path: Path) -> None:
    (tmp_path / "meshes.py").write_text(MESHES)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=4"]
    done = subprocess.run(
        [*torchrun, "meshes.py"], cwd=tmp_path, env=environment(), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    for rank in range(4):
        coordinates = [f"{rank}, 0", f"{rank // 2}, {rank % 2}", f"0, {rank}"]
        expected = [f"{rank} of 4", *(f"{rank} of 4 = {text}" for text in coordinates)]
        assert (tmp_path / f"mesh-{rank}").read_text() == "; ".join(expected)


def test_one_process_has_no_mesh_and_is_the_only_data_parallel_rank() -> None:
    context = DistributedContext(0, 1, 1, torch.device("cpu"), 1)
    assert context.with_mesh(1) is context and context.mesh is None
    assert (context.dp_rank, context.dp_size) == (0, 1)


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
def test_incomplete_torchrun_variables_are_refused(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], expected: str
) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(RuntimeEnvironmentError, match=expected):
        init_distributed("cpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
@pytest.mark.parametrize("device", ["cuda", "cuda:1"])
def test_a_missing_gpu_is_refused(device: str) -> None:
    with pytest.raises(RuntimeEnvironmentError, match="finds no NVIDIA GPU"):
        resolve_device(device, 0, 1)


@pytest.mark.parametrize(("device", "local_rank", "world_size"), [("cuda", 2, 3), ("auto", 2, 3), ("cuda:2", 0, 1)])
def test_more_ranks_than_gpus_are_refused(
    monkeypatch: pytest.MonkeyPatch, device: str, local_rank: int, world_size: int
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert resolve_device("cuda", 1, 2) == torch.device("cuda", 1)
    with pytest.raises(
        RuntimeEnvironmentError, match=r"device: got cuda:2, but this machine has 2 GPU\(s\); start at most one rank"
    ):
        resolve_device(device, local_rank, world_size)


def test_ranks_share_the_processors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    num_processors = resolve_num_threads(1)
    assert resolve_num_threads(num_processors) == 1
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # torchrun's own default does not count as the user's choice
    assert resolve_num_threads(2) == max(1, num_processors // 2)
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert resolve_num_threads(2) == 3
    for invalid in ("0", "-4", "many", "99999", "\u0663"):
        monkeypatch.setenv("OMP_NUM_THREADS", invalid)
        assert resolve_num_threads(1) == num_processors


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="the system gives a process all processors")
def test_only_processors_that_this_process_may_use_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    processors = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(processors)})
        assert resolve_num_threads(1) == 1
    finally:
        os.sched_setaffinity(0, processors)


@pytest.fixture
def rank_of_two(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Makes this process one of two ranks, at an address where the other never joins."""

    def set_variables(rank: int, address: str, port: int | str) -> None:
        variables = {"RANK": rank, "WORLD_SIZE": 2, "LOCAL_RANK": 0, "MASTER_ADDR": address, "MASTER_PORT": port}
        for name, value in variables.items():
            monkeypatch.setenv(name, str(value))

    return set_variables


def free_port() -> int:
    """A port on which nothing listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_names_the_rank_that_did_not_join(rank_of_two: Callable[..., None], rank: int) -> None:
    port = free_port()
    rank_of_two(rank, "127.0.0.1", port)
    message = rf"^process group: rank {1 - rank} of 2 did not join at 127\.0\.0\.1:{port} within 0\.3 s, [^\n]*$"
    with pytest.raises(RuntimeEnvironmentError, match=message) as raised:
        init_distributed("cpu", 0.3)
    assert raised.value.exit_code == 6


@pytest.mark.parametrize("rank", [0, 1])
def test_an_unknown_host_name_ends_the_wait_long_before_the_limit(
    rank_of_two: Callable[..., None], monkeypatch: pytest.MonkeyPatch, rank: int
) -> None:
    assert rendezvous.RESOLVE_SECONDS <= 20
    monkeypatch.setattr(rendezvous, "RESOLVE_SECONDS", 0.3)
    rank_of_two(rank, "nowhere.invalid", 29500)
    with pytest.raises(RuntimeEnvironmentError, match=r"could not reach the other ranks at nowhere\.invalid:29500"):
        init_distributed("cpu", 900)


@pytest.mark.parametrize(
    ("rank", "expected"), [(0, "EADDRINUSE"), (1, "the process that listens there does not answer")]
)
def test_a_port_taken_by_another_program_is_reported(
    rank_of_two: Callable[..., None], rank: int, expected: str
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        rank_of_two(rank, "127.0.0.1", server.getsockname()[1])
        with pytest.raises(RuntimeEnvironmentError, match=rf"^process group: [^\n]*{expected}[^\n]*$"):
            init_distributed("cpu", 0.3)


@pytest.mark.parametrize("port", ["", "x", "-1", "65536", "99999999999999999999"])
def test_an_invalid_port_is_refused(rank_of_two: Callable[..., None], port: str) -> None:
    rank_of_two(0, "127.0.0.1", port)
    with pytest.raises(RuntimeEnvironmentError, match=rf"MASTER_PORT='{port}', expected a host and a port"):
        init_distributed("cpu", 900)


TRAIN_WHEN_BOTH_HAVE_IMPORTED = """
import os, time
from pathlib import Path
from distgpt import train
from distgpt.errors import exit_process, run_command
Path("imported-" + os.environ["RANK"]).touch()
while len(list(Path().glob("imported-*"))) < 2:
    time.sleep(0.01)
exit_process(run_command(train.main))
"""
"""Importing torch takes longer on one rank than on the other; a short time limit must not include that."""


def test_two_of_three_ranks_exit_with_code_6_and_name_the_third(config_file: Path, tmp_path: Path) -> None:
    """Started by hand, as on three machines. Rank 0 hosts the store, and rank 1 still learns who is missing."""
    port = free_port()
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", TRAIN_WHEN_BOTH_HAVE_IMPORTED, str(config_file), "hang_minutes=0.1"],
            cwd=tmp_path,
            env=environment(RANK=str(rank), WORLD_SIZE="3", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)),
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    for process in processes:
        _, stderr = process.communicate(timeout=120)
        assert process.returncode == 6, stderr
        assert stderr == (
            f"distgpt: error: process group: rank 2 of 3 did not join at 127.0.0.1:{port} within 6 s, "
            "expected all ranks; start every rank, with this MASTER_ADDR and MASTER_PORT\n"
        )
    assert not (tmp_path / "run").exists()


FAILS_ONCE = """
import os
from pathlib import Path
from distgpt.distributed.context import init_distributed
from distgpt.errors import exit_process
context = init_distributed("cpu", 60)
Path(f"joined-{context.restart_count}-{context.rank}").write_text(str(context.all_gather_object(context.rank)))
if context.rank == 1 and context.restart_count == 0:
    os._exit(9)
context.close()
exit_process(0)
"""


def test_ranks_restarted_by_torchrun_join_again(tmp_path: Path) -> None:
    (tmp_path / "fails_once.py").write_text(FAILS_ONCE)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=3", "--max-restarts=1"]
    done = subprocess.run(
        [*torchrun, "fails_once.py"], cwd=tmp_path, env=environment(), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert [(tmp_path / f"joined-1-{rank}").read_text() for rank in range(3)] == ["[0, 1, 2]"] * 3


def test_ranks_with_different_configs_libraries_or_source_are_refused_with_both_values(
    config_file: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    shutil.copytree(REPO / "distgpt", other / "distgpt", ignore=shutil.ignore_patterns("__pycache__"))
    with (other / "distgpt" / "models" / "gpt2.py").open("a") as file:
        file.write("\n# another line\n")
    (other / "sitecustomize.py").write_text("import numpy\nnumpy.__version__ = '1.26.0'\n")
    address = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    processes = [
        subprocess.Popen(
            command("train", [config_file, f"seed={rank}"]),
            cwd=tmp_path,
            env=environment(RANK=str(rank), PYTHONPATH=str(path), **address),
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank, path in enumerate((REPO, other))
    ]
    for process in processes:
        _, stderr = process.communicate(timeout=120)
        assert process.returncode == 2, stderr
        lines = stderr.splitlines()
        assert [line.split(": ")[2] for line in lines] == ["seed", "numpy version", "distgpt's source"]
        assert lines[0].startswith("distgpt: error: seed: rank 0 has 0 and rank 1 has 1, expected the same on every")
        assert f'rank 0 has "{np.__version__}" and rank 1 has "1.26.0"' in lines[1]
    assert not (tmp_path / "run").exists()
