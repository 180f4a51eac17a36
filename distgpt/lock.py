"""Whose the output folder is, and how its last run ended: the lock, `status.json`, and the count of crashes.

Only rank 0 holds a lock. Imports no torch.
"""

from __future__ import annotations

import contextlib
import datetime
import fcntl
import json
import os
import socket
import threading
import time
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from distgpt import durable
from distgpt.errors import CrashLoopError, MachineError

LOCK_SECONDS = 8
"""How long to wait for the lock: workers of a launcher that was killed notice within 5 s."""

MOST_CRASHES = 3
"""Crashes at one step, in a row, after which a run is not started again by itself."""


class Progress(NamedTuple):
    """What the lock file tells of the run that wrote it: no signal, however rude, takes it back."""

    step: int = 0
    """The step that was being made; 0 before the first."""
    crashes: int = 0
    """Runs in a row, up to the one that wrote this, that had crashed at the same step."""
    crashed_at: int = 0
    """That step."""


class Lock:
    """The right to write to an output folder, until this process ends.

    `restarts` counts how often torchrun has started this run again by itself. Raises MachineError if another run has
    the folder, CrashLoopError where starting once more would be in vain.
    """

    def __init__(self, output_dir: Path, restarts: int) -> None:
        self.output_dir = output_dir
        durable.make(output_dir)
        self.file: TextIO = open(os.open(output_dir / ".lock", os.O_RDWR | os.O_CREAT, 0o666), "r+")  # no O_APPEND
        self.writing = threading.Lock()
        self.waited = wait_for(self.file, output_dir)
        """Whether another run had to end first."""
        self.progress = self.count_crashes(read_status(output_dir), restarts)
        self.at_step(0)
        self.status("starting")
        for pattern in (".*.partial", ".tmp??????"):  # ours, and those of safetensors
            durable.remove_leftovers(output_dir, pattern)

    def count_crashes(self, last: dict[str, Any], restarts: int) -> Progress:
        """What the run that begins now has to know of those before it, `last` being the status of the last.

        A run that says itself that it failed has crashed, and so has one that torchrun found dead. One that was killed
        together with its launcher has not: the machine went away, or the user was impatient.
        """
        progress = self.read()
        crashed = last.get("state") == "failed" or restarts > 0
        if not crashed:
            ended = last.get("state") in ("finished", "stopped")
            return Progress() if ended else progress
        if last.get("code") == CrashLoopError.exit_code and restarts == 0:  # somebody has read it, and tries again
            return Progress()
        if progress.step > 0:
            again = progress.crashes + 1 if progress.step == progress.crashed_at else 1
            progress = Progress(0, again, progress.step)
        if progress.crashes >= MOST_CRASHES:
            reason = f"{progress.crashes} crashes in a row at step {progress.crashed_at}"
            self.status("failed", progress.crashed_at, reason, CrashLoopError.exit_code)
            told = f" (the last: {last['reason']})" if last.get("reason") else ""
            raise CrashLoopError(
                f"{self.output_dir}: {reason}{told}, expected progress; mend the cause, then run the same command "
                "again, which goes on from the last checkpoint",
                everywhere=True,
            )
        return progress

    def read(self) -> Progress:
        """What the last run wrote of its progress."""
        with contextlib.suppress(OSError, ValueError):
            self.file.seek(0)
            step, crashes, crashed_at = map(int, self.file.read(100).split())
            return Progress(step, crashes, crashed_at)
        return Progress()

    def at_step(self, step: int) -> None:
        """Note the step that begins, in one write to the lock file (2 us, no flush: it is to survive us, not power)."""
        self.progress = self.progress._replace(step=step)
        with contextlib.suppress(OSError):  # a full disk: the count of crashes is lost, nothing else
            os.pwrite(
                self.file.fileno(),
                f"{step:>20} {self.progress.crashes:>3} {self.progress.crashed_at:>20}\n".encode(),
                0,
            )

    def status(self, state: str, step: int = 0, reason: str = "", code: int | None = None) -> None:
        """Replace `status.json`; `state` is starting, running, finished, stopped or failed."""
        process = {"pid": os.getpid(), "launcher": os.getppid(), "host": socket.gethostname(), "at": now()}
        told = {"state": state, "step": step, "reason": reason, "code": code} | process
        with self.writing, contextlib.suppress(OSError):  # a full disk is no reason to fail
            durable.replace(self.output_dir / "status.json", (json.dumps(told) + "\n").encode())

    def release(self) -> None:
        """Let the next run have it."""
        self.file.close()


def wait_for(file: TextIO, output_dir: Path) -> bool:
    """Take the lock on a file; whether that took a wait. Raises MachineError naming the run that keeps it."""
    waited, until = False, time.monotonic() + LOCK_SECONDS
    while True:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return waited
        except OSError:
            if time.monotonic() > until:
                owner = read_status(output_dir)
                process = "another run"
                if "pid" in owner:
                    process = f"process {owner['pid']} on {owner.get('host')}, since {owner.get('at')}"
                raise MachineError(
                    f"output_dir: {output_dir} is in use by {process}; stop that run or choose another",
                    everywhere=True,
                ) from None
            waited = True
            time.sleep(0.2)


def now() -> str:
    """The date and time, in UTC."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def read_status(output_dir: Path) -> dict[str, Any]:
    """What `status.json` holds; nothing if there is none."""
    try:
        status = json.loads((output_dir / "status.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return status if isinstance(status, dict) else {}
