"""The surroundings of the process: locale, clock, limits, network, libraries, secrets, hostile names.

They do not affect a run, or they are refused in one line.
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

from distgpt import train
from distgpt.checkpoint import store
from distgpt.checkpoint.store import Checkpoint
from distgpt.distributed.context import DistributedContext
from distgpt.errors import CheckpointError
from tests.conftest import REPO, TINY, Run, command, environment, read_metrics, training_curve
from tests.started import PLAIN
from tests.test_structure import MODULES, imported, tree

SECRET = "canary-5f1d0c7e"


LONGER = ("num_training_steps=16", "lr_decay_steps=12")
"""Extends a finished run of 12 steps; its learning rate stays at min_lr."""


def start(config_file: Path, *overrides: str) -> None:
    """Train in this process."""
    train.main([str(config_file), *PLAIN, *overrides])


def with_sitecustomize(folder: Path, code: str) -> str:
    """A PYTHONPATH on which every Python process runs `code` as it starts."""
    (folder / "sitecustomize.py").write_text(code)
    return f"{folder}{os.pathsep}{REPO}"


# Locale, home, limits, variables


@pytest.mark.parametrize(("name", "extra_variables"), [("caf\u00e9 \u65e5\u672c", {}), ("cafe", {"PYTHONUTF8": "0"})])
def test_a_run_needs_no_utf8_locale_no_home_and_no_terminal(
    config_file: Path, tmp_path: Path, corpus: Path, name: str, extra_variables: dict[str, str]
) -> None:
    """Paths with other than ASCII characters need Python's UTF-8 mode, which is the default in a C locale."""
    folder = tmp_path / name
    folder.mkdir()
    (folder / "t.npz").write_bytes(corpus.read_bytes())
    text = config_file.read_text() + "# na\u00efve\n"
    (folder / "c.yaml").write_text(text.replace(str(corpus), f"{name}/t.npz"), encoding="utf-8")
    variables = {"PATH": os.environ["PATH"], "LC_ALL": "C", "PYTHONPATH": str(REPO)} | extra_variables
    line = command("train", [f"{name}/c.yaml", f"output_dir={name}/r", "wandb=auto", *PLAIN])
    done = subprocess.run(
        line, cwd=tmp_path, env=variables, stdin=subprocess.DEVNULL, capture_output=True, encoding="utf-8", check=False
    )
    assert done.returncode == 0, done.stderr
    assert f"are in {name}/r" in done.stdout
    assert (folder / "r" / "eval.json").exists()


def test_two_ranks_run_with_64_open_files_no_temporary_folder_stale_variables_and_a_closed_pipe(
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


def test_no_module_forks_starts_processes_or_needs_shared_memory() -> None:
    for module in MODULES:
        assert not any("multiprocessing" in name and "errors" not in name for name in imported(module)), module
        calls = {ast.unparse(node.func) for node in ast.walk(tree(module)) if isinstance(node, ast.Call)}
        assert not calls & {"os.fork", "os.posix_spawn", "subprocess.Popen", "subprocess.run"}, module
        assert "num_workers" not in {node.arg for node in ast.walk(tree(module)) if isinstance(node, ast.keyword)}


# Clock


def test_a_clock_that_jumps_affects_neither_durations_nor_the_choice_of_a_checkpoint(
    config_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real_time, calls = time.time, [0]

    def jumping() -> float:
        calls[0] += 1
        return real_time() + (86_400 if calls[0] % 2 else -86_400)

    monkeypatch.setattr(time, "time", jumping)
    start(config_file, "max_minutes=5")
    rows = [row for row in read_metrics(tmp_path / "run") if "tokens-per-second" in row]
    assert len(rows) == 12 and all(0 < row["tokens-per-second"] < 1e8 for row in rows)
    for age, (_, path) in enumerate(
        sorted(store.list_checkpoints(tmp_path / "run"))
    ):  # the newest gets the oldest time
        for file in [path, *path.iterdir()]:
            os.utime(file, (real_time() - age * 10**6, real_time() - age * 10**6))
    newest, _ = store.latest_valid(tmp_path / "run")
    assert newest is not None and newest.step == 12
    start(config_file, *LONGER)
    assert [step for step, _, _ in training_curve(tmp_path / "run")] == list(range(1, 17))


def test_the_date_is_only_displayed() -> None:
    for module in MODULES:
        calls = {ast.unparse(node.func) for node in ast.walk(tree(module)) if isinstance(node, ast.Call)}
        assert not calls & {"time.time", "time.time_ns", "datetime.now", "datetime.datetime.utcnow"}, module
        assert module == "resilience.run_lock" or "datetime.datetime.now" not in calls, module
        assert not any(name.endswith("st_mtime") for name in map(ast.unparse, ast.walk(tree(module))) if len(name) < 99)


# Libraries and hardware that changed


def test_other_threads_and_another_torch_are_reported_and_the_run_resumes(
    config_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    start(config_file)
    checkpoint, _ = store.latest_valid(tmp_path / "run")
    assert checkpoint is not None and checkpoint.state["run"]["platform"]["threads"] == 1
    monkeypatch.setattr(torch, "__version__", "2.99.0")
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    capsys.readouterr()
    start(config_file, *LONGER)
    torch_version = checkpoint.state["run"]["platform"]["torch"]
    changes = f"torch 2.99.0 (was {torch_version}), threads 2 (was 1)"
    note = f"note    results will not be bit-identical to an uninterrupted run: {changes}\n"
    assert note in capsys.readouterr().out
    assert len(training_curve(tmp_path / "run")) == 16


def test_every_allowed_torch_loads_weights_safely() -> None:
    """CVE-2025-32434 (before 2.6) and CVE-2026-24747 (before 2.10) ran code from files that were only read."""
    project = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]
    (floor,) = [one for one in map(Requirement, project["dependencies"]) if one.name == "torch"]
    assert not any(floor.specifier.contains(version) for version in ("2.5.1", "2.6.0", "2.9.1", "2.9.99"))
    assert floor.specifier.contains(torch.__version__.split("+")[0])


NO_UNPICKLING = """
import pickle, os, sys
import distgpt.check, distgpt.evaluate, distgpt.generate, distgpt.train

lookups = []
sys.addaudithook(lambda event, args: lookups.append(args) if event == "pickle.find_class" else None)
config, run, *overrides = sys.argv[1:]
distgpt.train.main([config, *overrides])
distgpt.train.main([config, *overrides, "num_training_steps=14", "lr_decay_steps=12"])
distgpt.evaluate.main([run])
distgpt.generate.main([run, "--prompt", "x"])
assert not lookups, lookups
pickle.loads(pickle.dumps(os.mkdir))
assert lookups, "the audit hook does not work"
"""


def test_no_command_unpickles_anything(config_file: Path, tmp_path: Path) -> None:
    """Neither does torch's reader of checkpoints: the interpreter raises an audit event for each class it looks up."""
    line = [sys.executable, "-c", NO_UNPICKLING, str(config_file), str(tmp_path / "run"), *PLAIN]
    done = subprocess.run(line, cwd=tmp_path, env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert ": after step 12\n" in done.stdout


# Network


NO_NETWORK = """
import os, sys

def refuse_network(event, args):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname"):
        print(event, args, file=sys.__stderr__, flush=True)
        os._exit(99)

sys.addaudithook(refuse_network)
"""


def test_a_run_with_gpt2_tokens_uses_no_network(tmp_path: Path, run: Run) -> None:
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
    """The addresses, in the kernel's hexadecimal, on which a process listens."""
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
    """torchrun's own store listens on every device, as its documentation says."""
    run = begin(2, *PLAIN, "num_training_steps=1000000", "checkpoint.every=1000000", "eval.every=1000000")
    run.wait_for_steps(2)
    ranks = run.ranks()
    assert sorted(ranks) == [0, 1]
    for pid in ranks.values():
        addresses = listeners(pid)
        assert addresses and set(addresses) <= LOOPBACK
    os.kill(run.process.pid, signal.SIGTERM)


def test_ranks_exchange_json_and_no_pickles() -> None:
    """torch's object collectives unpickle what another process sends, and gloo does not authenticate it.

    DistributedContext has methods of the same names, which exchange JSON.
    """
    for module in MODULES:
        used = {ast.unparse(node) for node in ast.walk(tree(module)) if isinstance(node, ast.Attribute | ast.Name)}
        for name in used | imported(module):
            if name.endswith(("_object", "_object_list")):
                owner, _, method = name.rpartition(".")
                assert owner.split(".")[-1] in ("self", "context") and hasattr(DistributedContext, method), name


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
    ("module", "message"),
    [
        (ABSENT, "wandb: stopped (ImportError: no wandb here); metrics.jsonl has every number"),
        pytest.param(SLOW, "wandb: still busy after 15 s; metrics.jsonl has", marks=pytest.mark.slow),
    ],
)
def test_metrics_are_complete_when_wandb_fails_or_hangs(
    config_file: Path, tmp_path: Path, run: Run, module: str, message: str
) -> None:
    (tmp_path / "fake" / "wandb").mkdir(parents=True)
    (tmp_path / "fake" / "wandb" / "__init__.py").write_text(module)
    path = f"{tmp_path / 'fake'}{os.pathsep}{REPO}"
    done = run("train", config_file, *PLAIN, "wandb=online", PYTHONPATH=path)
    assert done.returncode == 0, done.stderr
    assert message in done.stdout
    assert len(training_curve(tmp_path / "run")) == 12
    assert (
        not (tmp_path / "sent").exists() or len((tmp_path / "sent").read_text()) < 3
    )  # the run did not wait for wandb


# Secrets


def test_no_secret_of_the_environment_appears_in_output_or_files(config_file: Path, tmp_path: Path, run: Run) -> None:
    """In a run with wandb, and in a command that fails with a traceback."""
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


# Tokens that are too few, or change during a run


@pytest.mark.slow
def test_too_few_tokens_for_four_ranks_are_reported_once_with_the_number_needed(
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


def test_a_run_whose_tokens_are_truncated_ends_and_resumes_after_they_are_restored(
    begin: Any, corpus: Path, tmp_path: Path, run: Run
) -> None:
    whole = corpus.read_bytes()
    copied = tmp_path / "copied.npz"
    copied.write_bytes(whole)
    endless = (*PLAIN, f"data={copied}", "num_training_steps=1000000", "checkpoint.every=5", "eval.every=1000000")
    started = begin(1, *endless)
    started.wait_for_checkpoint(5)
    os.truncate(copied, 5000)
    assert started.process.wait(60) == 3
    (line,) = started.lines()
    assert f"{copied}: ends at byte 5000, expected" in line and "restore it" in line
    assert started.status()["code"] == 3
    step = started.newest_step()
    again = run("check", tmp_path / "tiny.yaml", *endless)
    assert again.returncode == 3 and f"{copied}: damaged .npz" in again.stderr
    copied.write_bytes(whole)
    third = begin(1, *endless)
    third.wait_until(lambda: f": after step {step:,}\n" in third.text())
    third.process.send_signal(signal.SIGTERM)
    assert third.process.wait(60) == 75


@pytest.mark.parametrize("key", ["eval.every", "checkpoint.every"])
def test_an_interval_longer_than_the_run_is_noted_and_allowed(
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
    """A copy of the finished run."""
    shutil.copytree(trained_once, tmp_path / "run")
    return tmp_path / "run"


@pytest.mark.parametrize(
    "name",
    ["../../../outside", "../step-00000008/state.json", "/etc/hostname", "a\0b", "a\nb", "..", ".", "", "x" * 5000],
)
def test_a_manifest_cannot_name_files_outside_its_folder(finished: Path, name: str) -> None:
    path = finished / "checkpoints" / "step-00000012" / store.MANIFEST
    outside = finished.parent / "outside"
    outside.write_text("outside")
    manifest = json.loads(path.read_text())
    manifest["files"][name] = store.file_digest(outside)
    path.write_text(store.to_json(manifest))
    with pytest.raises(CheckpointError, match="step-00000012"):
        store.verify(path.parent)


def test_linked_files_in_an_output_folder_are_neither_loaded_nor_deleted(
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
    start(config_file, *LONGER)
    start(config_file, "--fresh", "seed=1")
    assert {path: path.read_bytes() for path in outside.iterdir()} == before


def test_a_linked_file_of_a_checkpoint_is_not_read(finished: Path, tmp_path: Path) -> None:
    state = finished / "checkpoints" / "step-00000012" / store.STATE
    state.rename(tmp_path / "state.json")
    state.symlink_to(tmp_path / "state.json")
    newest, skipped = store.latest_valid(finished)
    assert isinstance(newest, Checkpoint) and newest.step == 8
    assert "not a regular file" in skipped[0]


def test_a_run_without_a_compiler_notes_it_once_and_trains(run: Run, config_file: Path, tmp_path: Path) -> None:
    without = {"CXX": str(tmp_path / "nothing"), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    long = ("num_training_steps=1000000", "batch_size=64", "eval.max_tokens=64", "max_minutes=0.2")
    done = run("train", config_file, *long, **without)
    assert done.returncode == 75, done.stderr
    note = "note    not compiled, since compiling a test function failed here; install a C++ compiler"
    assert done.stdout.count(note) == 1
    assert ", not compiled, torch" in done.stdout
    forced = run("train", config_file, "compile=on", f"output_dir={tmp_path}/other", **without)
    assert forced.returncode == 6
    assert "compile: got on, but compiling a test function failed here; install a C++ compiler" in forced.stderr
