"""A real run in the background: started, watched, told to stop or killed, and never left behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

from distgpt import checkpoint
from tests.conftest import command, environment, training_curve

PLAIN = ("precision=fp32", "compile=off")


def alive(pid: int) -> bool:
    """Whether a process runs (or could: a stopped one does, a zombie does not)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def listens(pid: int) -> bool:
    """Whether a process has its signal handlers."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False
    caught = int(next(line for line in status.splitlines() if line.startswith("SigCgt")).split()[1], 16)
    return bool(caught >> (signal.SIGUSR2 - 1) & 1)


def processes_in(folder: Path) -> list[int]:
    """Every living process whose working directory is `folder`, whoever its parent is by now."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdecimal() and (entry / "cwd").resolve() == folder.resolve() and alive(int(entry.name)):
                found.append(int(entry.name))
        except OSError:
            continue
    return found


class Started:
    """`distgpt.train` on so many ranks, in a process group of its own."""

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
        line = command("train", [config, *arguments], ranks)
        extra = {}
        if ranks > 1:
            place = line.index("--standalone")
            line[place:place] = torchrun_options
        if fault is not None:
            line.insert(line.index("distgpt.train"), "tests.faulty")
            extra["DISTGPT_FAULT"] = fault
        self.began_at = time.monotonic()
        self.process = subprocess.Popen(
            line,
            cwd=folder,
            env=environment(**extra),
            stdout=self.log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def wait_for_steps(self, steps: int) -> None:
        """Until so many training steps are on record."""
        self.wait_until(lambda: self.recorded() >= steps)

    def wait_for_checkpoint(self, step: int = 1) -> None:
        """Until a checkpoint of that step or a later one is there."""
        self.wait_until(lambda: max((saved for saved, _ in checkpoint.on_disk(self.output_dir)), default=0) >= step)

    def wait_until(self, done: Any, seconds: float = 120) -> None:
        """Until `done()`; fails if the run ends before, or takes longer."""
        deadline = time.monotonic() + seconds
        while not done():
            assert self.process.poll() is None and time.monotonic() < deadline, self.text()
            time.sleep(0.05)

    def recorded(self) -> int:
        """Training steps on record."""
        try:
            return len(training_curve(self.output_dir))
        except (OSError, ValueError):  # none yet, or half a line
            return 0

    def ranks(self) -> dict[int, int]:
        """Process of each rank."""
        found: dict[int, int] = {}
        for pid in processes_in(self.folder):
            try:
                variables = (Path("/proc") / str(pid) / "environ").read_bytes().split(b"\0")
            except OSError:
                continue
            if (line := next((v for v in variables if v.startswith(b"RANK=")), None)) is not None:
                found.setdefault(int(line[5:]), pid)
        return found or {0: self.process.pid}

    def text(self) -> str:
        """Everything it has printed."""
        self.log.flush()
        return Path(self.log.name).read_text(errors="replace")

    def lines(self) -> list[str]:
        """What it has said in our own voice."""
        return [line for line in self.text().splitlines() if line.startswith("distgpt: ")]

    def status(self) -> dict[str, Any]:
        """Its `status.json`."""
        status: dict[str, Any] = json.loads((self.output_dir / "status.json").read_text())
        return status

    def newest_step(self) -> int:
        """Step of the newest checkpoint, which verifies, as all do; 0 without one."""
        found, rejected = checkpoint.newest(self.output_dir)
        assert not rejected, rejected
        return 0 if found is None else found.step

    def end(self) -> None:
        """Kill, without warning, every process of it that is left, and wait until none is."""
        while left := processes_in(self.folder):
            for pid in left:
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    pass
            self.process.poll()
            time.sleep(0.01)
        self.process.wait()
        self.log.close()
