"""The launch scripts and the installed command."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from distgpt import __version__
from tests.conftest import REPO, environment, read_metrics

RUN = REPO / "launch" / "run.sh"

pytestmark = pytest.mark.skipif(
    not (REPO / ".venv" / "installed-for-dev").exists(), reason="no .venv: start the tests with ./launch/test.sh"
)


def run_sh(folder: Path, *arguments: object, **extra: str) -> subprocess.CompletedProcess[str]:
    """Run launch/run.sh in a folder."""
    variables = {name: value for name, value in environment(**extra).items() if name != "PYTHONPATH"}
    return subprocess.run(
        [str(RUN), *map(str, arguments)],
        cwd=folder,
        env=variables,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.mark.parametrize("ranks", ["1", "2"])
def test_a_run_starts_with_one_command(config_file: Path, tmp_path: Path, ranks: str) -> None:
    done = run_sh(tmp_path, config_file, "precision=fp32", NPROC=ranks)
    assert done.returncode == 0, done.stderr
    assert f"device  {ranks} x " in done.stdout
    assert "OMP_NUM_THREADS" not in done.stderr  # torchrun warns if the script has not set it
    assert read_metrics(tmp_path / "run")[-1]["step"] == 12


@pytest.mark.parametrize("ranks", ["1", "2"])
def test_a_run_stopped_by_a_signal_exits_with_75(config_file: Path, tmp_path: Path, ranks: str) -> None:
    variables = {name: value for name, value in environment(NPROC=ranks).items() if name != "PYTHONPATH"}
    process = subprocess.Popen(
        [str(RUN), str(config_file), "precision=fp32", "compile=off", "num_training_steps=1000000"],
        cwd=tmp_path,
        env=variables,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 120
    while not ((tmp_path / "run" / "metrics.jsonl").exists() and len(read_metrics(tmp_path / "run")) > 3):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.1)
    process.send_signal(signal.SIGUSR1)
    assert process.wait(60) == 75
    assert process.stderr is not None and "(SIGUSR1), everything saved" in process.stderr.read()


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("bathc_size=3",), 2, "bathc_size: unknown key; did you mean batch_size?"),
        (("data=nowhere.npz",), 3, "nowhere.npz: cannot read"),
        (("--bogus",), 2, "unrecognized arguments: --bogus"),
    ],
)
def test_a_mistake_is_reported_once_with_any_number_of_ranks(
    config_file: Path, tmp_path: Path, arguments: tuple[str, ...], code: int, message: str
) -> None:
    done = run_sh(tmp_path, config_file, *arguments, NPROC="4")
    assert done.returncode == code
    assert done.stderr.splitlines()[-1].endswith(message) or message in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr and not (tmp_path / "run").exists()


def test_usage_help_and_ranks(config_file: Path, tmp_path: Path) -> None:
    assert run_sh(tmp_path).returncode == 2
    assert "max_lr (number, required)" in run_sh(tmp_path, "--help").stdout
    done = run_sh(tmp_path, config_file, NPROC="two")
    assert done.returncode == 6 and "NPROC: got 'two'" in done.stderr


def test_scripts_are_executable_and_valid_bash() -> None:
    for path in [*(REPO / "launch").glob("*.sh"), REPO / ".ci" / "run"]:
        assert os.access(path, os.X_OK)
        assert subprocess.run(["bash", "-n", str(path)], check=False).returncode == 0


def test_the_installed_command_runs_the_same_commands(tmp_path: Path) -> None:
    distgpt = REPO / ".venv" / "bin" / "distgpt"
    done = subprocess.run(
        [str(distgpt), "config", str(REPO / "configs" / "GPT-tiny.yaml")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0 and "# 32 sequences" in done.stdout
    wrong = subprocess.run([str(distgpt), "trian"], capture_output=True, text=True, check=False)
    version = subprocess.run([str(distgpt), "--version"], capture_output=True, text=True, check=False)
    assert (version.returncode, version.stdout) == (0, f"distgpt {__version__}\n")
    assert wrong.returncode == 2 and "expected one of train, generate" in wrong.stderr
