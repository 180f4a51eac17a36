"""The lock on an output folder, `status.json`, and the count of crashes. Imports no torch; only rank 0 holds a lock.

`python -m distgpt.resilience.run_lock OUTPUT_DIR LAUNCHER CODE` is for launch/run.sh: it exits with the code that the
ranks started by process LAUNCHER wrote to `status.json`, else with CODE.
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
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from distgpt import atomic_io
from distgpt.errors import CrashLoopError, RuntimeEnvironmentError, exit_process, run_command

LOCK_SECONDS = 8
"""How long to wait for the lock. The ranks of a launcher that was killed exit within 5 s."""

MAX_CRASHES = 3
"""Crashes at the same step, in a row, after which a run is no longer restarted automatically."""


class _LockRecord(NamedTuple):
    """Content of the lock file, which survives any signal to the run that wrote it."""

    step: int = 0
    """The update being made; 0 before the first."""
    num_crashes: int = 0
    """Consecutive earlier runs that crashed at `crash_step`."""
    crash_step: int = 0


class RunLock:
    """The exclusive right to write to an output folder, until this process ends or releases it.

    `restart_count` is the number of times torchrun has restarted this run. Raises RuntimeEnvironmentError if another
    run holds the folder, CrashLoopError if the run has crashed at the same step too often.
    """

    def __init__(self, output_dir: Path, restart_count: int) -> None:
        self.output_dir = output_dir
        atomic_io.make_dirs(output_dir)
        self._file: TextIO = open(os.open(output_dir / ".lock", os.O_RDWR | os.O_CREAT, 0o666), "r+")  # no O_APPEND
        self._status_lock = threading.Lock()
        self.waited = _wait_for_lock(self._file, output_dir)
        """Whether another run had to exit first."""
        self._record = self._count_crashes(read_status(output_dir), restart_count)
        self.record_step(0)
        self.write_status("starting")
        for pattern in (".*.partial", ".tmp??????"):  # of distgpt and of safetensors
            atomic_io.remove_leftovers(output_dir, pattern)

    def record_step(self, step: int) -> None:
        """Record the update that begins, in one write to the lock file. It takes 2 us, without a flush: the record must
        survive this process, not a power failure."""
        self._record = self._record._replace(step=step)
        line = f"{step:>20} {self._record.num_crashes:>3} {self._record.crash_step:>20}\n"
        with contextlib.suppress(OSError):  # a full disk: only the count of crashes is lost
            os.pwrite(self._file.fileno(), line.encode(), 0)

    def write_status(self, state: str, step: int = 0, reason: str = "", code: int | None = None) -> None:
        """Replace `status.json`. `state` is starting, running, finished, stopped or failed."""
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        process = {"pid": os.getpid(), "launcher": os.getppid(), "host": socket.gethostname(), "at": now}
        status = {"state": state, "step": step, "reason": reason, "code": code} | process
        with self._status_lock, contextlib.suppress(OSError):  # a full disk is not a reason to fail
            atomic_io.write_bytes(self.output_dir / "status.json", (json.dumps(status) + "\n").encode())

    def release(self) -> None:
        """Let another run have the folder."""
        self._file.close()

    def _count_crashes(self, last_status: dict[str, Any], restart_count: int) -> _LockRecord:
        """The record of the run that begins now, from the status and the record of the last one.

        A run whose status says that it failed has crashed, and so has one that torchrun restarts. A run that was killed
        together with its launcher has not: the machine failed, or the user ended it.
        """
        record = self._read_record()
        crashed = last_status.get("state") == "failed" or restart_count > 0
        if not crashed:
            ended = last_status.get("state") in ("finished", "stopped")
            return _LockRecord() if ended else record
        if last_status.get("code") == CrashLoopError.exit_code and restart_count == 0:  # the user has seen the error
            return _LockRecord()
        if record.step > 0:
            num_crashes = record.num_crashes + 1 if record.step == record.crash_step else 1
            record = _LockRecord(0, num_crashes, record.step)
        if record.num_crashes >= MAX_CRASHES:
            reason = f"{record.num_crashes} crashes in a row at step {record.crash_step}"
            self.write_status("failed", record.crash_step, reason, CrashLoopError.exit_code)
            last_reason = f" (the last: {last_status['reason']})" if last_status.get("reason") else ""
            raise CrashLoopError(
                f"{self.output_dir}: {reason}{last_reason}, expected progress; fix the cause, then run the same "
                "command again, which resumes from the last checkpoint",
                on_all_ranks=True,
            )
        return record

    def _read_record(self) -> _LockRecord:
        """What the last run recorded; zeros if it recorded nothing."""
        with contextlib.suppress(OSError, ValueError):
            self._file.seek(0)
            step, num_crashes, crash_step = map(int, self._file.read(100).split())
            return _LockRecord(step, num_crashes, crash_step)
        return _LockRecord()


def read_status(output_dir: Path) -> dict[str, Any]:
    """The content of `status.json`; empty if there is none."""
    try:
        status = json.loads((output_dir / "status.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return status if isinstance(status, dict) else {}


def _wait_for_lock(file: TextIO, output_dir: Path) -> bool:
    """Lock a file; returns whether another run held it at first. Raises RuntimeEnvironmentError naming that run."""
    waited, deadline = False, time.monotonic() + LOCK_SECONDS
    while True:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return waited
        except OSError:
            if time.monotonic() > deadline:
                status = read_status(output_dir)
                owner = "another run"
                if "pid" in status:
                    owner = f"process {status['pid']} on {status.get('host')}, since {status.get('at')}"
                raise RuntimeEnvironmentError(
                    f"output_dir: {output_dir} is in use by {owner}; stop that run or choose another output_dir",
                    on_all_ranks=True,
                ) from None
            waited = True
            time.sleep(0.2)


def main(arguments: Sequence[str]) -> int:
    """For launch/run.sh: the exit code that the ranks of process LAUNCHER wrote. OUTPUT_DIR LAUNCHER CODE."""
    output_dir, launcher, code = arguments
    status = read_status(Path(output_dir))
    return int(code if status.get("launcher") != int(launcher) or status.get("code") is None else status["code"])


if __name__ == "__main__":
    exit_process(run_command(main))
