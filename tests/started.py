"""A training run in the background, which a test can watch, signal or kill, and which never outlives the test."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from distgpt.checkpoint import store
from tests.conftest import command, environment, training_curve

PLAIN = ("precision=fp32", "compile=off")


def alive(pid: int) -> bool:
    """Whether a process exists and is not a zombie. A suspended process is alive."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def handles_signals(pid: int) -> bool:
    """Whether a process has installed its signal handlers."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False
    caught = int(next(line for line in status.splitlines() if line.startswith("SigCgt")).split()[1], 16)
    return bool(caught >> (signal.SIGUSR2 - 1) & 1)


def processes_in(folder: Path) -> list[int]:
    """Every living process whose working directory is `folder`, whatever its parent is by now."""
    pids = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdecimal() and (entry / "cwd").resolve() == folder.resolve() and alive(int(entry.name)):
                pids.append(int(entry.name))
        except OSError:
            continue
    return pids


class Started:
    """`distgpt.train` on a number of ranks, in a process group of its own."""

    def __init__(
        self,
        folder: Path,
        ranks: int,
        *arguments: str,
        config: str = "tiny.yaml",
        fault: str | None = None,
        torchrun_options: tuple[str, ...] = (),
    ) -> None:
        self.folder, self.output_dir = folder, folder / "run"
        self.log = (folder / "log").open("w+")
        command_line = command("train", [config, *arguments], ranks)
        variables = {}
        if ranks > 1:
            index = command_line.index("--standalone")
            command_line[index:index] = torchrun_options
        if fault is not None:
            command_line.insert(command_line.index("distgpt.train"), "tests.faulty")
            variables["DISTGPT_FAULT"] = fault
        self.began_at = time.monotonic()
        self.process = subprocess.Popen(
            command_line,
            cwd=folder,
            env=environment(**variables),
            stdout=self.log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def wait_for_steps(self, num_steps: int) -> None:
        """Wait until metrics.jsonl has that many training steps."""
        self.wait_until(lambda: self.recorded() >= num_steps)

    def wait_for_checkpoint(self, step: int = 1) -> None:
        """Wait until there is a checkpoint of that step or a later one."""
        self.wait_until(lambda: max((saved for saved, _ in store.list_checkpoints(self.output_dir)), default=0) >= step)

    def wait_until(self, condition: Callable[[], bool], seconds: float = 120) -> None:
        """Wait until `condition()` is true. Fails if the run ends before that or the time is up."""
        deadline = time.monotonic() + seconds
        while not condition():
            assert self.process.poll() is None and time.monotonic() < deadline, self.text()
            time.sleep(0.05)

    def recorded(self) -> int:
        """Number of training steps in metrics.jsonl."""
        try:
            return len(training_curve(self.output_dir))
        except (OSError, ValueError):  # no file yet, or an incomplete line
            return 0

    def ranks(self) -> dict[int, int]:
        """The process id of each rank."""
        pid_of_rank: dict[int, int] = {}
        for pid in processes_in(self.folder):
            try:
                variables = (Path("/proc") / str(pid) / "environ").read_bytes().split(b"\0")
            except OSError:
                continue
            if (variable := next((v for v in variables if v.startswith(b"RANK=")), None)) is not None:
                pid_of_rank.setdefault(int(variable[5:]), pid)
        return pid_of_rank or {0: self.process.pid}

    def text(self) -> str:
        """Everything that the run has printed."""
        self.log.flush()
        return Path(self.log.name).read_text(errors="replace")

    def lines(self) -> list[str]:
        """The printed lines that start with `distgpt: `."""
        return [line for line in self.text().splitlines() if line.startswith("distgpt: ")]

    def status(self) -> dict[str, Any]:
        """The content of its `status.json`."""
        status: dict[str, Any] = json.loads((self.output_dir / "status.json").read_text())
        return status

    def newest_step(self) -> int:
        """Step of the newest checkpoint, 0 without one. Fails if any checkpoint is damaged."""
        checkpoint, skipped = store.latest_valid(self.output_dir)
        assert not skipped, skipped
        return 0 if checkpoint is None else checkpoint.step

    def end(self) -> None:
        """Kill all processes of the run that are left, and wait until they are gone."""
        while pids := processes_in(self.folder):
            for pid in pids:
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    pass
            self.process.poll()
            time.sleep(0.01)
        self.process.wait()
        self.log.close()
