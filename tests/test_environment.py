"""What surrounds the process: locale, clock, limits, network, libraries, secrets, hostile names. Nothing of it matters,
or it is refused in a line.
"""

from __future__ import annotations

import ast
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from packaging.requirements import Requirement

from distgpt import checkpoint, train
from distgpt.checkpoint import Checkpoint
from distgpt.errors import CheckpointError
from tests.conftest import REPO, TINY, Run, command, environment, read_metrics, training_curve
from tests.started import PLAIN
from tests.test_layers import ROOMS, imported, tree

SECRET = "canary-5f1d0c7e"


def start(config_file: Path, *overrides: str) -> None:
    """Train in this process."""
    train.main([str(config_file), *PLAIN, *overrides])


def with_sitecustomize(folder: Path, code: str) -> str:
    """A PYTHONPATH on which every Python process runs `code` as it starts."""
    (folder / "sitecustomize.py").write_text(code)
    return f"{folder}{os.pathsep}{REPO}"


# Locale, home, limits, variables


@pytest.mark.parametrize(("name", "variables"), [("caf\u00e9 \u65e5\u672c", {}), ("cafe", {"PYTHONUTF8": "0"})])
def test_a_c_locale_no_home_and_no_terminal_do_not_matter(
    config_file: Path, tmp_path: Path, corpus: Path, name: str, variables: dict[str, str]
) -> None:
    """Paths that are no ASCII need Python's UTF-8 mode, which it takes by itself in a C locale."""
    folder = tmp_path / name
    folder.mkdir()
    (folder / "t.npz").write_bytes(corpus.read_bytes())
    text = config_file.read_text() + "# na\u00efve\n"
    (folder / "c.yaml").write_text(text.replace(str(corpus), f"{name}/t.npz"), encoding="utf-8")
    bare = {"PATH": os.environ["PATH"], "LC_ALL": "C", "PYTHONPATH": str(REPO)} | variables
    line = command("train", [f"{name}/c.yaml", f"output_dir={name}/r", "wandb=auto", *PLAIN])
    done = subprocess.run(
        line, cwd=tmp_path, env=bare, stdin=subprocess.DEVNULL, capture_output=True, encoding="utf-8", check=False
    )
    assert done.returncode == 0, done.stderr
    assert f"are in {name}/r" in done.stdout
    assert (folder / "r" / "eval.json").exists()


def test_two_ranks_get_by_with_64_files_no_temporary_folder_stale_variables_and_a_reader_that_leaves(
    config_file: Path, tmp_path: Path
) -> None:
    stale = {"SLURM_PROCID": "7", "SLURM_NTASKS": "8", "SLURM_LOCALID": "3", "SLURM_JOB_ID": "1", "PMI_RANK": "5"}
    line = " ".join(command("train", [config_file, *PLAIN], ranks=2))
    done = subprocess.run(
        ["bash", "-c", f"set -o pipefail; ulimit -n 64; {line} | head -1"],
        cwd=tmp_path,
        env=environment(TMPDIR="/proc/none", **stale),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 1
    assert len(training_curve(tmp_path / "run")) == 12


def test_stale_variables_of_a_scheduler_do_not_make_one_process_a_rank(
    config_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in {"SLURM_PROCID": "7", "SLURM_NTASKS": "8", "OMPI_COMM_WORLD_RANK": "3", "PMI_SIZE": "4"}.items():
        monkeypatch.setenv(name, value)
    start(config_file)
    assert "device  1 x " in capsys.readouterr().out


def test_no_room_forks_starts_worker_processes_or_needs_shared_memory() -> None:
    for room in ROOMS:
        assert not any("multiprocessing" in name and "errors" not in name for name in imported(room)), room
        calls = {ast.unparse(node.func) for node in ast.walk(tree(room)) if isinstance(node, ast.Call)}
        assert not calls & {"os.fork", "os.posix_spawn", "subprocess.Popen", "subprocess.run"}, room
        assert "num_workers" not in {node.arg for node in ast.walk(tree(room)) if isinstance(node, ast.keyword)}


# Clock


def test_a_clock_that_jumps_moves_neither_durations_nor_the_choice_of_a_checkpoint(
    config_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = time.time, [0]

    def jumping() -> float:
        calls[0] += 1
        return real() + (86_400 if calls[0] % 2 else -86_400)

    monkeypatch.setattr(time, "time", jumping)
    start(config_file, "max_minutes=5")
    rows = [row for row in read_metrics(tmp_path / "run") if "tokens-per-second" in row]
    assert len(rows) == 12 and all(0 < row["tokens-per-second"] < 1e8 for row in rows)
    for age, (_, path) in enumerate(sorted(checkpoint.on_disk(tmp_path / "run"))):  # the newest looks oldest
        for file in [path, *path.iterdir()]:
            os.utime(file, (real() - age * 10**6, real() - age * 10**6))
    newest, _ = checkpoint.newest(tmp_path / "run")
    assert newest is not None and newest.step == 12
    start(config_file, "num_training_steps=16")
    assert [step for step, _, _ in training_curve(tmp_path / "run")] == list(range(1, 17))


def test_the_date_is_only_shown() -> None:
    for room in ROOMS:
        calls = {ast.unparse(node.func) for node in ast.walk(tree(room)) if isinstance(node, ast.Call)}
        assert not calls & {"time.time", "time.time_ns", "datetime.now", "datetime.datetime.utcnow"}, room
        assert room == "lock" or "datetime.datetime.now" not in calls, room
        assert not any(name.endswith("st_mtime") for name in map(ast.unparse, ast.walk(tree(room))) if len(name) < 99)


# Libraries and hardware that changed


def test_other_threads_and_another_torch_are_told_and_the_run_goes_on(
    config_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    start(config_file)
    found, _ = checkpoint.newest(tmp_path / "run")
    assert found is not None and found.state["platform"]["threads"] == 1
    monkeypatch.setattr(torch, "__version__", "2.99.0")
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    capsys.readouterr()
    start(config_file, "num_training_steps=14")
    was = found.state["platform"]["torch"]
    note = f"note    the same run but for rounding, not bit for bit: torch 2.99.0 (was {was}), threads 2 (was 1)\n"
    assert note in capsys.readouterr().out
    assert len(training_curve(tmp_path / "run")) == 14


def test_every_torch_allowed_loads_weights_safely() -> None:
    """CVE-2025-32434 (before 2.6) and CVE-2026-24747 (before 2.10) ran code from files that were only read."""
    project = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]
    (floor,) = [one for one in map(Requirement, project["dependencies"]) if one.name == "torch"]
    assert not any(floor.specifier.contains(version) for version in ("2.5.1", "2.6.0", "2.9.1", "2.9.99"))
    assert floor.specifier.contains(torch.__version__.split("+")[0])


NO_UNPICKLING = """
import pickle, os, sys
import distgpt.check, distgpt.evaluate, distgpt.generate, distgpt.train

heard = []
sys.addaudithook(lambda event, args: heard.append(args) if event == "pickle.find_class" else None)
config, run, *overrides = sys.argv[1:]
distgpt.train.main([config, *overrides])
distgpt.train.main([config, *overrides, "num_training_steps=14"])
distgpt.evaluate.main([run])
distgpt.generate.main([run, "--prompt", "x"])
assert not heard, heard
pickle.loads(pickle.dumps(os.mkdir))
assert heard, "the interpreter does not tell"
"""


def test_no_command_unpickles_anything(config_file: Path, tmp_path: Path) -> None:
    """Not torch's own reader of checkpoints either: the interpreter itself tells of each class that is looked up."""
    line = [sys.executable, "-c", NO_UNPICKLING, str(config_file), str(tmp_path / "run"), *PLAIN]
    done = subprocess.run(line, cwd=tmp_path, env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "going on after step 12" in done.stdout


# Network


NO_NETWORK = """
import os, sys

def hear(event, args):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname"):
        print(event, args, file=sys.__stderr__, flush=True)
        os._exit(99)

sys.addaudithook(hear)
"""


def test_a_run_with_gpt2s_tokens_asks_no_network(tmp_path: Path, run: Run) -> None:
    ids = np.random.default_rng(0).integers(0, 50_257, 3000).astype(np.uint16)
    np.savez(tmp_path / "t.npz", train=ids, val=ids[:100])
    arguments = ("data=t.npz", "seq_len=16", "batch_size=2", "num_training_steps=2", "num_warmup_steps=1")
    line = ("train", REPO / "configs" / "GPT-tiny.yaml", *arguments, *PLAIN, f"output_dir={tmp_path / 'run'}")
    done = run(*line, PYTHONPATH=with_sitecustomize(tmp_path, NO_NETWORK), HOME=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "eval.json").exists()


LOOPBACK = {"0100007F", "00000000000000000000000001000000", "0000000000000000FFFF00000100007F"}
LISTENING = "0A"


def listeners(pid: int) -> list[str]:
    """Addresses, in the kernel's hexadecimal, at which a process listens."""
    sockets = set()
    for link in Path(f"/proc/{pid}/fd").iterdir():
        try:
            sockets.add(str(link.readlink()).removeprefix("socket:[").removesuffix("]"))
        except OSError:
            continue
    rows = [
        line.split()
        for name in ("tcp", "tcp6")
        if (path := Path(f"/proc/{pid}/net/{name}")).exists()
        for line in path.read_text().splitlines()[1:]
    ]
    return [row[1].split(":")[0] for row in rows if row[3] == LISTENING and row[9] in sockets]


@pytest.mark.skipif(not Path("/proc/net/tcp").exists(), reason="no /proc")
def test_ranks_of_one_machine_listen_on_the_loopback_device_only(begin: Any) -> None:
    """Ranks, that is: torchrun's own store listens on every device, as its documentation says."""
    run = begin(2, *PLAIN, "num_training_steps=1000000", "checkpoint.every=1000000", "eval.every=1000000")
    run.wait_for_steps(2)
    ranks = run.ranks()
    assert sorted(ranks) == [0, 1]
    for pid in ranks.values():
        found = listeners(pid)
        assert found and set(found) <= LOOPBACK
    os.kill(run.process.pid, signal.SIGTERM)


def test_ranks_exchange_json_and_no_pickles() -> None:
    """Object collectives unpickle what another rank sends, and gloo does not ask who that is."""
    for room in ROOMS:
        named = {ast.unparse(node) for node in ast.walk(tree(room)) if isinstance(node, ast.Attribute | ast.Name)}
        assert not any(name.endswith(("_object", "_object_list")) for name in named | imported(room)), room


# wandb


ABSENT = "raise ImportError('no wandb here')"
SLOW = """
import time
class Settings:
    def __init__(self, **given): pass
class Run:
    def log(self, record, step):
        with open("sent", "a") as file:
            file.write(".")
        time.sleep(30)
    def finish(self): time.sleep(1000)
def init(**given):
    time.sleep(2)
    return Run()
"""


@pytest.mark.parametrize(
    ("module", "told"),
    [
        (ABSENT, "wandb: stopped (ImportError: no wandb here); metrics.jsonl has every number"),
        pytest.param(SLOW, "wandb: still busy after 15 s; metrics.jsonl has", marks=pytest.mark.slow),
    ],
)
def test_whatever_wandb_does_the_run_has_every_number(
    config_file: Path, tmp_path: Path, run: Run, module: str, told: str
) -> None:
    (tmp_path / "fake" / "wandb").mkdir(parents=True)
    (tmp_path / "fake" / "wandb" / "__init__.py").write_text(module)
    path = f"{tmp_path / 'fake'}{os.pathsep}{REPO}"
    done = run("train", config_file, *PLAIN, "wandb=online", PYTHONPATH=path)
    assert done.returncode == 0, done.stderr
    assert told in done.stdout
    assert len(training_curve(tmp_path / "run")) == 12
    assert not (tmp_path / "sent").exists() or len((tmp_path / "sent").read_text()) < 3  # nothing waited for them


# Secrets


def test_no_secret_of_the_environment_gets_into_any_output_or_file(config_file: Path, tmp_path: Path, run: Run) -> None:
    """In a run with wandb, and in one that fails with its traceback."""
    names = ("WANDB_API_KEY", "HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "GITHUB_TOKEN", "MY_PASSWORD")
    secrets = {name: f"{SECRET}-{name.lower()}-0123456789abcdef" for name in names}
    done = run("train", config_file, *PLAIN, "wandb=offline", **secrets)
    failed = run("check", config_file, "data=nowhere.npz", "--debug", "--fresh", **secrets)
    assert (done.returncode, failed.returncode) == (0, 1) and "Traceback" in failed.stderr
    assert SECRET not in done.stdout + done.stderr + failed.stdout + failed.stderr
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    kinds = {path.suffix for path in files}
    assert {".wandb", ".yaml", ".json", ".jsonl", ".safetensors"} <= kinds
    assert not [path for path in files if SECRET.encode() in path.read_bytes()]


# Data that is too little, or changes under a run


@pytest.mark.slow
def test_four_ranks_that_lack_tokens_say_so_once_with_how_many_they_need(
    config_file: Path, tmp_path: Path, run: Run
) -> None:
    np.savez(tmp_path / "few.npz", train=np.arange(1000) % 200, val=np.arange(50))
    done = run("train", config_file, f"data={tmp_path / 'few.npz'}", "global_batch_size=32", *PLAIN, ranks=4)
    lines = [line for line in done.stderr.splitlines() if line.startswith("distgpt: ")]
    assert done.returncode == 1 and len(lines) == 1  # torchrun's code
    assert (
        "few.npz: train has 1,000 tokens, expected at least 1,025 (32 sequences of seq_len 32 in one step)" in lines[0]
    )
    assert not (tmp_path / "run").exists()


def test_tokens_cut_short_under_a_run_end_it_and_restored_let_it_go_on(
    begin: Any, corpus: Path, tmp_path: Path, run: Run
) -> None:
    whole = corpus.read_bytes()
    own = tmp_path / "own.npz"
    own.write_bytes(whole)
    endless = (*PLAIN, f"data={own}", "num_training_steps=1000000", "checkpoint.every=5", "eval.every=1000000")
    started = begin(1, *endless)
    started.wait_for_checkpoint(5)
    os.truncate(own, 5000)
    assert started.process.wait(60) == 3
    (line,) = started.lines()
    assert f"{own}: ends at byte 5000, expected" in line and "restore it" in line
    assert started.status()["code"] == 3
    step = started.newest_step()
    again = run("check", tmp_path / "tiny.yaml", *endless)
    assert again.returncode == 3 and f"{own}: damaged .npz" in again.stderr
    own.write_bytes(whole)
    third = begin(1, *endless)
    third.wait_until(lambda: f"going on after step {step}\n" in third.text())
    third.process.send_signal(signal.SIGTERM)
    assert third.process.wait(60) == 75


@pytest.mark.parametrize("key", ["eval.every", "checkpoint.every"])
def test_an_interval_longer_than_the_run_is_told_and_allowed(
    config_file: Path, key: str, capsys: pytest.CaptureFixture[str]
) -> None:
    start(config_file, f"{key}=13")
    assert f"note    {key} is 13, more than the 12 steps of the run: only at its end\n" in capsys.readouterr().out


# Hostile names


@pytest.fixture(scope="module")
def trained_once(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    (folder / "tiny.yaml").write_text(TINY.format(folder=folder, corpus=corpus))
    start(folder / "tiny.yaml")
    return folder / "run"


@pytest.fixture
def finished(trained_once: Path, tmp_path: Path) -> Path:
    """A finished run of one's own."""
    shutil.copytree(trained_once, tmp_path / "run")
    return tmp_path / "run"


@pytest.mark.parametrize(
    "name",
    ["../../../outside", "../step-00000008/state.json", "/etc/hostname", "a\0b", "a\nb", "..", ".", "", "x" * 5000],
)
def test_a_manifest_leads_to_no_file_outside_its_folder(finished: Path, name: str) -> None:
    path = finished / "checkpoints" / "step-00000012" / checkpoint.MANIFEST
    outside = finished.parent / "outside"
    outside.write_text("theirs")
    manifest = json.loads(path.read_text())
    manifest["files"][name] = checkpoint.describe(outside)
    path.write_text(checkpoint.to_json(manifest))
    with pytest.raises(CheckpointError, match="step-00000012"):
        checkpoint.verify(path.parent)


def test_links_in_an_output_folder_lead_to_nothing_that_is_loaded_or_deleted(
    finished: Path, config_file: Path, tmp_path: Path
) -> None:
    outside = tmp_path / "outside"
    step_12 = finished / "checkpoints" / "step-00000012"
    step_12.rename(outside)
    step_12.symlink_to(outside)
    for name in ("model.safetensors", "config.yaml", "status.json", "eval.json"):
        (finished / name).rename(outside / name)
        (finished / name).symlink_to(outside / name)
    before = {path: path.read_bytes() for path in outside.iterdir()}
    start(config_file, "num_training_steps=16")
    start(config_file, "--fresh", "seed=1")
    assert {path: path.read_bytes() for path in outside.iterdir()} == before


def test_a_linked_file_of_a_checkpoint_is_not_read(finished: Path, tmp_path: Path) -> None:
    state = finished / "checkpoints" / "step-00000012" / checkpoint.STATE
    state.rename(tmp_path / "state.json")
    state.symlink_to(tmp_path / "state.json")
    newest, rejected = checkpoint.newest(finished)
    assert isinstance(newest, Checkpoint) and newest.step == 8
    assert "not a file of a checkpoint" in rejected[0]


def test_a_machine_without_a_compiler_is_told_once_and_trains(run: Run, config_file: Path, tmp_path: Path) -> None:
    without = {"CXX": str(tmp_path / "nothing"), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    long = ("num_training_steps=1000000", "batch_size=64", "eval.max_tokens=64", "max_minutes=0.2")
    found = run("train", config_file, *long, **without)
    assert found.returncode == 75, found.stderr
    assert found.stdout.count("note    not compiled, since compiling a line failed here; install a C++ compiler") == 1
    assert ", not compiled, torch" in found.stdout
    forced = run("train", config_file, "compile=on", f"output_dir={tmp_path}/other", **without)
    assert forced.returncode == 6
    assert "compile: got on, but compiling a line failed here; install a C++ compiler" in forced.stderr
